// Code-space attention over packed bytes on the CPU; the mathematics is that of attention_problem.py.
//
// Rows of the query (candidates x heads) are handled L at a time, one per vector lane; a block of rows of one
// user goes through the history once, with a running softmax over chunks of events.

#include <cmath>

#include "columns.h"
#include "parallel.h"

namespace {

constexpr int kChunkFloats = 4096;  // scores held at a time: 16 KiB, half a first-level cache
constexpr int kWide = 16;           // floats per step where events need not be told apart
typedef Lanes<kWide>::F Wide;

struct AttentionProblem {
  Layout layout;
  const float* query;        // [users, rows, features]
  const int64_t* offsets;    // [users + 1]
  const float* offset;       // [users, rows] or null
  const float* bias;         // [events, bias_heads] or null
  const int64_t* order;      // users, longest history first
  float* scratch;            // [threads, scratch_floats]
  int64_t users, rows, heads, bias_heads, softmax, threads, scratch_floats;
};

struct ForwardOut {
  float *z, *total, *peak;
};

struct BackwardArgs {
  const float *grad_z, *grad_total, *z, *total, *peak;
  float *grad_query, *grad_offset, *grad_bias;  // grad_bias: null where there is no bias
};

// Rows first .. first + lanes - 1 of a user.
struct Block {
  int64_t user, first;
  int lanes;
};

template <int L>
class Worker {
  typedef typename Lanes<L>::F F;
  static constexpr int kChunk = kChunkFloats / L;  // events

 public:
  Worker(const AttentionProblem& problem, float* scratch, int tables) : p_(problem), coder_(problem.layout) {
    const int64_t size = Coder<L>::table_floats(p_.layout.count);
    scores_ = scratch;
    grads_ = scores_ + kChunkFloats;
    sums_ = grads_ + kChunkFloats;
    float* next = sums_ + size;
    for (int t = 0; t < tables; t++, next += size) {
      table_[t] = next;
      coder_.poison(next);
    }
    for (int t = 0; t < tables; t++, next += p_.layout.features * L) transposed_[t] = next;
  }

  // Results of empty histories are left as they come: zeros, and -inf for the peak of a softmax.
  void forward(const Block& b, const ForwardOut& out) {
    const int64_t begin = p_.offsets[b.user], end = p_.offsets[b.user + 1];
    if (begin == end) return;
    start(b, end - begin, 0, p_.query);
    F peak = splat<L>(-kInf), total = F{};
    const F base = lane_values(p_.offset, b, 0.0f);
    for (int64_t at = begin; at < end; at += kChunk) {
      const int n = static_cast<int>(std::min<int64_t>(kChunk, end - at));
      coder_.gather(table_[0], transposed_[0], at, n, base, scores_);
      add_bias(b, at, n);
      pad(scores_, n, -kInf);
      Wide shift = Wide{};
      if (p_.softmax) {
        const F before = peak;
        peak = largest(n, peak);
        const F origin = peak == splat<L>(-kInf) ? F{} : peak;
        if (at > begin && differ(before, peak)) {
          const F factor = vexp<L>(before - origin);
          total *= factor;
          coder_.shrink(sums_, factor);
        }
        shift = repeat(origin);
      }
      total += replace(n, [&](int k) {
        const Wide s = load<kWide>(scores_ + k);
        return p_.softmax ? vexp<kWide>(s - shift) : sigmoid(s);
      });
      coder_.scatter(sums_, at, n, scores_);
      coder_.settle(sums_);
    }
    coder_.fold(sums_, p_.softmax ? 1.0f / at_least_tiny(total) : splat<L>(1.0f), out.z, rows(b, p_.query));
    for (int l = 0; l < b.lanes; l++) {
      const int64_t at = b.user * p_.rows + b.first + l;
      out.total[at] = total[l];
      out.peak[at] = p_.softmax ? peak[l] : 0.0f;
    }
  }

  void backward(const Block& b, const BackwardArgs& args) {
    const int64_t begin = p_.offsets[b.user], end = p_.offsets[b.user + 1];
    if (begin == end) return;
    start(b, end - begin, 0, p_.query);
    coder_.build(table_[1], transposed_[1], rows(b, args.grad_z));
    const F base = lane_values(p_.offset, b, 0.0f);
    const F grad_total = lane_values(args.grad_total, b, 0.0f);
    F peak = lane_values(args.peak, b, 0.0f);
    peak = peak == splat<L>(-kInf) ? F{} : peak;
    const F inverse = 1.0f / at_least_tiny(lane_values(args.total, b, 1.0f));
    const Wide shift = repeat(peak), scale = repeat(inverse), all = repeat(grad_total);
    F delta = inner_products(b, args.grad_z, args.z), total = F{};
    for (int64_t at = begin; at < end; at += kChunk) {
      const int n = static_cast<int>(std::min<int64_t>(kChunk, end - at));
      coder_.gather(table_[0], transposed_[0], at, n, base, scores_);
      add_bias(b, at, n);
      coder_.gather(table_[1], transposed_[1], at, n, F{}, grads_);
      pad(scores_, n, -kInf);
      pad(grads_, n, 0.0f);
      replace(n, [&](int k) {
        const Wide s = load<kWide>(scores_ + k);
        return p_.softmax ? vexp<kWide>(s - shift) * scale : sigmoid(s);
      });
      if (p_.softmax && n == end - begin) {
        // The whole history is at hand: the mean of these very products cancels exactly where one event
        // has all the weight.
        delta = sum_of(n, [&](int k) { return load<kWide>(scores_ + k) * load<kWide>(grads_ + k); });
      }
      const Wide mean = repeat(delta);
      total += replace(n, [&](int k) {
        const Wide w = load<kWide>(scores_ + k), g = load<kWide>(grads_ + k);
        return p_.softmax ? w * (g - mean) : w * (1.0f - w) * (g + all);
      });
      coder_.scatter(sums_, at, n, scores_);
      coder_.settle(sums_);
      if (args.grad_bias) collect_bias(b, at, n, args.grad_bias);
    }
    coder_.fold(sums_, splat<L>(1.0f), args.grad_query, rows(b, p_.query));
    for (int l = 0; l < b.lanes; l++) args.grad_offset[b.user * p_.rows + b.first + l] = total[l];
  }

 private:
  Rows rows(const Block& b, const float* vectors) const {
    return Rows{vectors, b.user * p_.rows + b.first, b.lanes};
  }

  void start(const Block& b, int64_t events, int table, const float* vectors) {
    coder_.plan(events);
    coder_.build(table_[table], transposed_[table], rows(b, vectors));
    coder_.clear(sums_);
  }

  static F at_least_tiny(F x) {
    const F tiny = splat<L>(std::numeric_limits<float>::min());
    return x < tiny ? tiny : x;  // NaN stays
  }

  static Wide sigmoid(Wide s) { return 1.0f / (1.0f + vexp<kWide>(-s)); }

  // The same lanes for each of the events of a wide step.
  static Wide repeat(F v) {
    Wide w;
    for (int k = 0; k < kWide; k++) w[k] = v[k % L];
    return w;
  }

  // Give the last wide step of n events a value where there is no event.
  static void pad(float* values, int n, float value) {
    for (int k = n * L; k % kWide; k++) values[k] = value;
  }

  // The largest of `peak` and the scores of n events.
  F largest(int n, F peak) const {
    Wide top = repeat(peak);
    for (int k = 0; k < n * L; k += kWide) {
      const Wide s = load<kWide>(scores_ + k);
      top = s > top ? s : top;
    }
    for (int k = 0; k < kWide; k++) peak[k % L] = std::max(peak[k % L], top[k]);
    return peak;
  }

  // Sum over n events in two steps, whose rounding grows with the square root of what one step's would.
  template <typename Term>
  static F sum_of(int n, Term term) {
    Wide sum = Wide{};
    for (int first = 0; first < n * L; first += 32 * kWide) {
      Wide part = Wide{};
      for (int k = first; k < std::min(n * L, first + 32 * kWide); k += kWide) part += term(k);
      sum += part;
    }
    F total = F{};
    for (int k = 0; k < kWide; k++) total[k % L] += sum[k];
    return total;
  }

  // Replace the scores of n events, and return the sum of what they become.
  template <typename Value>
  F replace(int n, Value value) {
    return sum_of(n, [&](int k) {
      const Wide v = value(k);
      store<kWide>(scores_ + k, v);
      return v;
    });
  }

  static bool differ(F a, F b) {
    bool any = false;
    for (int l = 0; l < L; l++) any |= a[l] != b[l];
    return any;
  }

  F lane_values(const float* values, const Block& b, float otherwise) const {
    F v = splat<L>(otherwise);
    if (values)
      for (int l = 0; l < b.lanes; l++) v[l] = values[b.user * p_.rows + b.first + l];
    return v;
  }

  F inner_products(const Block& b, const float* x, const float* y) const {
    F v = F{};
    for (int l = 0; l < b.lanes; l++) {
      const int64_t at = (b.user * p_.rows + b.first + l) * p_.layout.features;
      double sum = 0;
      for (int64_t f = 0; f < p_.layout.features; f++) sum += double(x[at + f]) * y[at + f];
      v[l] = static_cast<float>(sum);
    }
    return v;
  }

  void add_bias(const Block& b, int64_t at, int n) {
    if (!p_.bias) return;
    for (int i = 0; i < n; i++) {
      const float* bias = p_.bias + (at + i) * p_.bias_heads;
      F v = splat<L>(bias[0]);
      if (p_.bias_heads > 1)
        for (int l = 0; l < L; l++) v[l] = bias[(b.first + l) % p_.heads];
      store<L>(scores_ + i * L, load<L>(scores_ + i * L) + v);
    }
  }

  void collect_bias(const Block& b, int64_t at, int n, float* grad_bias) const {
    for (int i = 0; i < n; i++) {
      float* g = grad_bias + (at + i) * p_.bias_heads;
      for (int l = 0; l < b.lanes; l++) g[(b.first + l) % p_.bias_heads] += scores_[i * L + l];
    }
  }

  const AttentionProblem& p_;
  Coder<L> coder_;
  float *scores_, *grads_, *sums_, *table_[2], *transposed_[2];
};

// Run `work(worker, block)` over every block of L rows, on several threads, longest histories first.
// With whole_users a user's blocks stay on one thread, which may then add into per-event results.
template <int L, typename Work>
void run(const AttentionProblem& p, int tables, bool whole_users, Work work) {
  const int64_t blocks = (p.rows + L - 1) / L;
  const int64_t items = whole_users ? p.users : p.users * blocks;
  const int64_t work_size = (p.offsets[p.users] + 50 * p.users) * p.layout.count * blocks;
  run_parallel(p.threads, items, work_size, [&](int64_t thread, auto next) {
    Worker<L> worker(p, p.scratch + thread * p.scratch_floats, tables);
    for (int64_t item = next(); item < items; item = next()) {
      const int64_t user = p.order[whole_users ? item : item / blocks];
      const int64_t begin = whole_users ? 0 : item % blocks;
      for (int64_t k = begin; k < (whole_users ? blocks : begin + 1); k++)
        work(worker, Block{user, k * L, static_cast<int>(std::min<int64_t>(L, p.rows - k * L))});
    }
  });
}

template <typename Work>
void dispatch(const AttentionProblem& p, int tables, bool whole_users, Work work) {
  if (p.rows <= 4) return run<4>(p, tables, whole_users, work);
  if (p.rows <= 8) return run<8>(p, tables, whole_users, work);
  return run<16>(p, tables, whole_users, work);
}

}  // namespace

extern "C" {

// Floats of scratch that one thread needs.
int64_t sid_attention_scratch(int64_t columns, int64_t features, int64_t rows, int64_t tables) {
  const int64_t lanes = rows <= 4 ? 4 : rows <= 8 ? 8 : 16;
  return 2 * kChunkFloats + ((1 + tables) * columns * kRows + tables * features) * lanes;
}

void sid_attention_forward(const AttentionProblem* p, const ForwardOut* out) {
  dispatch(*p, 1, false, [&](auto& worker, const Block& block) { worker.forward(block, *out); });
}

void sid_attention_backward(const AttentionProblem* p, const BackwardArgs* args) {
  dispatch(*p, 2, args->grad_bias != nullptr,
           [&](auto& worker, const Block& block) { worker.backward(block, *args); });
}
}
