// Code-space attention over packed bytes on the CPU: how the work is cut up, and by which way it is done.
//
// Rows of the query (candidates x heads) of one user are handled L at a time, one per vector lane. A block of
// rows and a part of the history are an item of work, so that threads share even a single block; the results of
// the parts are merged in their order, which does not depend on the number of threads.

#include "attention_product.h"
#include "attention_running.h"
#include "parallel.h"

namespace {

constexpr int kLanes = 16;             // of the widest blocks, the only ones that are worth putting events in order for
constexpr int kManyRows = 12;          // from which a history is put in order for its rows
constexpr int64_t kEnoughBlocks = 8;   // with fewer, histories are cut into parts
constexpr int64_t kPartEvents = 2048;  // events that a part has at least

template <int L>
class Plan {
 public:
  std::vector<Block> blocks;
  std::vector<GroupedEvents> grouped;  // [users], empty where a user's scores run
  int64_t parts = 1;

  Plan(const AttentionProblem& p, bool may_group) : p_(p), order_(p.row_starts[p.users]) {
    std::iota(order_.begin(), order_.end(), int64_t(0));
    int64_t longest = 0;
    for (int64_t user = 0; user < p.users; user++) {
      const auto begin = order_.begin() + p.row_starts[user], end = order_.begin() + p.row_starts[user + 1];
      if (p.limits)  // rows that see equally much share a block
        std::stable_sort(begin, end, [&](int64_t a, int64_t b) { return p.seen(user, a) > p.seen(user, b); });
      for (auto row = begin; row < end; row += std::min<int64_t>(L, end - row)) {
        const int64_t seen = p.seen(user, *row);
        if (!seen) break;
        blocks.push_back({user, &*row, static_cast<int>(std::min<int64_t>(L, end - row)), seen});
        longest = std::max(longest, seen);
      }
    }
    if (static_cast<int64_t>(blocks.size()) < kEnoughBlocks && !blocks.empty())
      parts = std::max<int64_t>(
          1, std::min<int64_t>(kEnoughBlocks / blocks.size(), longest / kPartEvents));
    std::stable_sort(blocks.begin(), blocks.end(), [](const Block& a, const Block& b) { return a.seen > b.seen; });
    if (may_group) group();
  }

  bool by_product(const Block& b) const { return !grouped.empty() && !grouped[b.user].groups.empty(); }

  // Events that part k of a block goes through.
  std::pair<int64_t, int64_t> range(const Block& b, int64_t k) const {
    const int64_t n = by_product(b) ? grouped[b.user].part_ends[grouped[b.user].parts(b.seen)] : b.seen;
    return {n * k / parts, n * (k + 1) / parts};
  }

  int64_t work() const {
    int64_t steps = 0;
    for (const Block& b : blocks) steps += (b.seen + 50) * p_.layout.count;
    return steps;
  }

 private:
  void group() {
    const Coder<L> coder(p_.layout);
    std::vector<int64_t> users;
    for (int64_t user = 0; user < p_.users; user++)
      if (p_.row_starts[user + 1] - p_.row_starts[user] >= kManyRows && coder.pays_for_tables(p_.events(user)))
        users.push_back(user);
    if (users.empty()) return;
    grouped.resize(p_.users);
    const int64_t events = p_.event_starts[p_.users] * p_.layout.count;
    run_parallel(p_.threads, users.size(), events, [&](int64_t, auto next) {
      for (int64_t k = next(); k < static_cast<int64_t>(users.size()); k = next()) {
        const int64_t user = users[k], first = p_.row_starts[user] / p_.heads;
        const int64_t begin = p_.event_starts[user], columns = p_.layout.count;
        grouped[user].fill({p_.layout.events + begin * columns, p_.events(user), columns,
                            p_.multiplicity ? p_.multiplicity + begin : nullptr},
                           p_.limits ? p_.limits + first : nullptr, p_.row_starts[user + 1] / p_.heads - first);
      }
    });
  }

  const AttentionProblem& p_;
  std::vector<int64_t> order_;
};

// Room for the sums of every part but the first, which has the outputs themselves.
class Parts {
 public:
  Parts(int64_t parts, int64_t rows, int64_t features, const Sums& first) : first_(first), rows_(rows), f_(features) {
    if (parts > 1) more_.resize((parts - 1) * rows * (features + 2));
  }

  Sums operator[](int64_t k) {
    if (!k) return first_;
    float* at = more_.data() + (k - 1) * rows_ * (f_ + 2);
    return {at, at + rows_ * f_, at + rows_ * (f_ + 1)};
  }

 private:
  const Sums first_;
  const int64_t rows_, f_;
  std::vector<float> more_;
};

// Merge the parts of a row's softmax (or sigmoid sums) into the first, and divide by the total.
void merge_row(const AttentionProblem& p, Parts& sums, int64_t parts, int64_t row) {
  const int64_t f = p.layout.features;
  const Sums out = sums[0];
  float peak = out.peak[row];
  for (int64_t k = 1; k < parts; k++) peak = std::max(peak, sums[k].peak[row]);
  const float origin = peak == -kInf ? 0.0f : peak;
  float* z = out.z + row * f;
  if (parts > 1) {
    const float own = std::exp(out.peak[row] - origin);
    out.total[row] *= own;
    for (int64_t j = 0; j < f; j++) z[j] *= own;
  }
  for (int64_t k = 1; k < parts; k++) {
    const Sums other = sums[k];
    const float share = std::exp(other.peak[row] - origin);
    out.total[row] += other.total[row] * share;
    for (int64_t j = 0; j < f; j++) z[j] += other.z[row * f + j] * share;
  }
  out.peak[row] = peak;
  if (!p.softmax) return;
  const float least = std::numeric_limits<float>::min();
  const float scale = 1.0f / (out.total[row] < least ? least : out.total[row]);
  for (int64_t j = 0; j < f; j++) z[j] *= scale;
}

template <int L>
void forward(const AttentionProblem& p, const ForwardOut& out) {
  Plan<L> plan(p, L == kLanes && p.softmax && !p.bias && !p.running);
  const int64_t parts = plan.parts, blocks = plan.blocks.size(), items = blocks * parts;
  Parts sums(parts, p.row_starts[p.users], p.layout.features, {out.z, out.total, out.peak});
  run_parallel(p.threads, items, plan.work(), [&](int64_t, auto next) {
    Running<L> running(p, 1);
    std::unique_ptr<Product<L>> product;
    for (int64_t item = next(); item < items; item = next()) {
      const Block& b = plan.blocks[item / parts];
      const auto [first, last] = plan.range(b, item % parts);
      if (!plan.by_product(b)) {
        running.forward(b, first, last, sums[item % parts]);
        continue;
      }
      if constexpr (L == kLanes) {
        const FlushTiny flush;
        if (!product) product = std::make_unique<Product<L>>(p, false);
        product->forward(b, plan.grouped[b.user], first, last, sums[item % parts]);
      }
    }
  });
  run_parallel(p.threads, blocks, plan.work(), [&](int64_t, auto next) {
    std::unique_ptr<Running<L>> running;
    for (int64_t item = next(); item < blocks; item = next()) {
      const Block& b = plan.blocks[item];
      int64_t merged = parts;
      bool fit = true;
      for (int l = 0; l < b.lanes && plan.by_product(b); l++) {
        float total = 0;
        for (int64_t k = 0; k < parts; k++) total += sums[k].total[b.rows[l]];
        fit &= fits(total) || !p.seen(b.user, b.rows[l]);
      }
      if (!fit) {
        if (!running) running = std::make_unique<Running<L>>(p, 1);
        running->forward(b, 0, b.seen, sums[0]);
        merged = 1;
      }
      for (int l = 0; l < b.lanes; l++) {
        merge_row(p, sums, merged, b.rows[l]);
        if (!p.seen(b.user, b.rows[l]) && p.softmax) out.peak[b.rows[l]] = -kInf;
      }
    }
  });
}

// With a gradient of the bias a user's blocks stay on one thread, which adds into per-event results.
template <int L>
void backward(const AttentionProblem& p, const BackwardArgs& args) {
  Plan<L> plan(p, L == kLanes && p.softmax && !p.bias && !p.running);
  const int64_t parts = plan.parts, blocks = plan.blocks.size();
  const int64_t items = (args.grad_bias ? p.users : blocks) * parts;
  const int64_t features = p.layout.features;
  Parts sums(parts, p.row_starts[p.users], features, {args.grad_query, args.grad_offset, nullptr});
  run_parallel(p.threads, items, 2 * plan.work(), [&](int64_t, auto next) {
    std::unique_ptr<Running<L>> running;
    std::unique_ptr<Product<L>> product;
    const auto work = [&](const Block& b, int64_t k) {
      auto [first, last] = plan.range(b, k);
      if constexpr (L == kLanes) {
        if (plan.by_product(b)) {
          const FlushTiny flush;
          if (!product) product = std::make_unique<Product<L>>(p, true);
          if (product->backward(b, plan.grouped[b.user], first, last, args, sums[k])) return;
          first = b.seen * k / parts, last = b.seen * (k + 1) / parts;
        }
      }
      if (!running) running = std::make_unique<Running<L>>(p, 2);
      running->backward(b, first, last, args, sums[k]);
    };
    for (int64_t item = next(); item < items; item = next()) {
      if (!args.grad_bias) {
        work(plan.blocks[item / parts], item % parts);
        continue;
      }
      for (const Block& b : plan.blocks)
        if (b.user == item / parts) work(b, item % parts);
    }
  });
  for (const Block& b : plan.blocks)
    for (int64_t k = 1; k < parts; k++) {
      const Sums out = sums[0], other = sums[k];
      for (int l = 0; l < b.lanes; l++) {
        const int64_t row = b.rows[l];
        out.total[row] += other.total[row];
        for (int64_t j = 0; j < features; j++) out.z[row * features + j] += other.z[row * features + j];
      }
    }
}

// Lanes for the rows that a user has at most.
int64_t most_rows(const AttentionProblem& p) {
  int64_t most = 0;
  for (int64_t user = 0; user < p.users; user++) most = std::max(most, p.row_starts[user + 1] - p.row_starts[user]);
  return most;
}

}  // namespace

extern "C" {

// Outputs come as zeros, the peak of a softmax as -inf: rows that see nothing are left alone.
void sid_attention_forward(const AttentionProblem* p, const ForwardOut* out) {
  const int64_t rows = most_rows(*p);
  if (rows <= 4) return forward<4>(*p, *out);
  if (rows <= 8) return forward<8>(*p, *out);
  return forward<16>(*p, *out);
}

// Gradients come as zeros.
void sid_attention_backward(const AttentionProblem* p, const BackwardArgs* args) {
  const int64_t rows = most_rows(*p);
  if (rows <= 4) return backward<4>(*p, *args);
  if (rows <= 8) return backward<8>(*p, *args);
  return backward<16>(*p, *args);
}
}
