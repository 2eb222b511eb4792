// Code-space attention over packed bytes on the CPU. The mathematics is that of problem.py.
//
// Every column of an event is a byte, so the score of an event is a sum of one table row per column and the
// weighted sum of features is a histogram of weights per column (asymmetric distance computation, made exact
// for attention). The digits themselves appear only when a table is built and when a histogram is folded.
// Rows of the query (candidates x heads) are handled L at a time, one per vector lane.

#include <algorithm>
#include <cmath>

#include "parallel.h"
#include "vectors.h"

namespace {

constexpr int kRows = 256;  // of every table, whatever the column's alphabet: a byte is always a safe index
constexpr int kChunkFloats = 4096;  // scores held at a time: 16 KiB, half a first-level cache
constexpr int kMaxDigits = 8;  // a byte holds at most 8 binary digits

struct Column {
  int32_t start, values, width, radices[kMaxDigits];  // width 0: one-hot
};

struct Problem {
  const float* query;        // [users, rows, features]
  const uint8_t* events;     // [events, columns]
  const int64_t* offsets;    // [users + 1]
  const float* offset;       // [users, rows] or null
  const float* bias;         // [events, bias_heads] or null
  const Column* columns;
  const int64_t* order;      // users, longest history first
  float* scratch;            // [threads, scratch_floats]
  int64_t users, rows, features, num_columns, heads, bias_heads, softmax, threads, scratch_floats;
};

struct ForwardOut {
  float *z, *total, *peak;
};

struct BackwardArgs {
  const float *grad_z, *grad_total, *z, *total, *peak;
  float *grad_query, *grad_offset, *grad_bias;  // grad_bias: null where there is no bias
};

// Rows m .. m + lanes - 1 of user u, as one block.
struct Block {
  int64_t user, first;
  int lanes;
};

template <int L>
class Worker {
  typedef typename Lanes<L>::F F;
  static constexpr int kChunk = kChunkFloats / L;  // events

 public:
  Worker(const Problem& problem, float* scratch, int tables) : p_(problem) {
    const int64_t size = p_.num_columns * kRows * L;
    scores_ = scratch;
    grads_ = scores_ + kChunkFloats;
    histogram_ = grads_ + kChunkFloats;
    table_[0] = histogram_ + size;
    table_[1] = table_[0] + size;
    // Rows outside the alphabet are NaN: a corrupt byte makes the result NaN, never a plausible number.
    for (int t = 0; t < tables; t++)
      for (int64_t c = 0; c < p_.num_columns; c++)
        std::fill(row(table_[t], c, p_.columns[c].values), row(table_[t], c + 1, 0),
                  std::numeric_limits<float>::quiet_NaN());
  }

  // Results of empty histories are left as they come: zeros, and -inf for the peak of a softmax.
  void forward(const Block& b, const ForwardOut& out) {
    if (p_.offsets[b.user] == p_.offsets[b.user + 1]) return;
    build(table_[0], p_.query, b);
    clear();
    F peak = splat<L>(-kInf), total = F{};
    const F base = lane_values(p_.offset, b, 0.0f);
    const int64_t end = p_.offsets[b.user + 1];
    for (int64_t at = p_.offsets[b.user]; at < end; at += kChunk) {
      const int n = static_cast<int>(std::min<int64_t>(kChunk, end - at));
      gather(table_[0], at, n, base, scores_);
      add_bias(b, at, n);
      F sum = F{};
      if (p_.softmax) {
        const F before = peak;
        for (int i = 0; i < n; i++) {
          const F s = load<L>(scores_ + i * L);
          peak = s > peak ? s : peak;
        }
        rescale(before, peak, at > p_.offsets[b.user], total);
        const F shift = peak == splat<L>(-kInf) ? F{} : peak;
        for (int i = 0; i < n; i++) {
          const F w = vexp<L>(load<L>(scores_ + i * L) - shift);
          store<L>(scores_ + i * L, w);
          sum += w;
        }
      } else {
        for (int i = 0; i < n; i++) {
          const F w = sigmoid(load<L>(scores_ + i * L));
          store<L>(scores_ + i * L, w);
          sum += w;
        }
      }
      total += sum;
      scatter(at, n, scores_);
    }
    finish(b, out, peak, total);
  }

  void backward(const Block& b, const BackwardArgs& args) {
    if (p_.offsets[b.user] == p_.offsets[b.user + 1]) return;
    build(table_[0], p_.query, b);
    build(table_[1], args.grad_z, b);
    clear();
    const F base = lane_values(p_.offset, b, 0.0f);
    const F grad_total = lane_values(args.grad_total, b, 0.0f);
    F peak = lane_values(args.peak, b, 0.0f), inverse = lane_values(args.total, b, 1.0f);
    peak = peak == splat<L>(-kInf) ? F{} : peak;
    inverse = 1.0f / at_least_tiny(inverse);
    F delta = F{}, total = F{};
    for (int l = 0; l < b.lanes; l++) {
      const int64_t at = (b.user * p_.rows + b.first + l) * p_.features;
      double sum = 0;
      for (int64_t f = 0; f < p_.features; f++) sum += double(args.grad_z[at + f]) * args.z[at + f];
      delta[l] = static_cast<float>(sum);
    }
    const int64_t end = p_.offsets[b.user + 1];
    for (int64_t at = p_.offsets[b.user]; at < end; at += kChunk) {
      const int n = static_cast<int>(std::min<int64_t>(kChunk, end - at));
      gather(table_[0], at, n, base, scores_);
      add_bias(b, at, n);
      gather(table_[1], at, n, F{}, grads_);
      F sum = F{};
      for (int i = 0; i < n; i++) {
        const F s = load<L>(scores_ + i * L);
        store<L>(scores_ + i * L, p_.softmax ? vexp<L>(s - peak) * inverse : sigmoid(s));
      }
      if (p_.softmax && n == end - p_.offsets[b.user]) {
        // The whole history is at hand: the mean of these very products cancels exactly where one event
        // has all the weight.
        delta = F{};
        for (int i = 0; i < n; i++) delta += load<L>(scores_ + i * L) * load<L>(grads_ + i * L);
      }
      for (int i = 0; i < n; i++) {
        const F w = load<L>(scores_ + i * L), g = load<L>(grads_ + i * L);
        const F d = p_.softmax ? w * (g - delta) : w * (1.0f - w) * (g + grad_total);
        store<L>(scores_ + i * L, d);
        sum += d;
      }
      total += sum;
      scatter(at, n, scores_);
      if (args.grad_bias) collect_bias(b, at, n, args.grad_bias);
    }
    fold(b, args.grad_query, splat<L>(1.0f));
    for (int l = 0; l < b.lanes; l++) args.grad_offset[b.user * p_.rows + b.first + l] = total[l];
  }

 private:
  float* row(float* table, int64_t column, int64_t value) const { return table + (column * kRows + value) * L; }

  static F at_least_tiny(F x) {
    const F tiny = splat<L>(std::numeric_limits<float>::min());
    return x < tiny ? tiny : x;  // NaN stays
  }

  static F sigmoid(F s) { return 1.0f / (1.0f + vexp<L>(-s)); }

  F lane_values(const float* rows, const Block& b, float otherwise) const {
    F v = splat<L>(otherwise);
    if (rows)
      for (int l = 0; l < b.lanes; l++) v[l] = rows[b.user * p_.rows + b.first + l];
    return v;
  }

  F feature(const float* vectors, const Block& b, int64_t f) const {
    F v = F{};
    for (int l = 0; l < b.lanes; l++) v[l] = vectors[(b.user * p_.rows + b.first + l) * p_.features + f];
    return v;
  }

  // Tables of a block: what each value of each column adds to the product with `vectors`.
  void build(float* table, const float* vectors, const Block& b) const {
    for (int64_t c = 0; c < p_.num_columns; c++) {
      const Column& column = p_.columns[c];
      float* rows = row(table, c, 0);
      if (!column.width) {
        for (int v = 0; v < column.values; v++) store<L>(rows + v * L, feature(vectors, b, column.start + v));
        continue;
      }
      store<L>(rows, F{});
      int size = 1;
      for (int j = 0; j < column.width; j++) {
        const F a = feature(vectors, b, column.start + j);
        const int k = column.radices[j];
        for (int d = k - 1; d >= 0; d--) {  // downwards: digit 0 overwrites what the others are made from
          const F step = a * (d - 0.5f * (k - 1));
          for (int r = 0; r < size; r++) store<L>(rows + (d * size + r) * L, load<L>(rows + r * L) + step);
        }
        size *= k;
      }
    }
  }

  void clear() {
    for (int64_t c = 0; c < p_.num_columns; c++)
      std::fill_n(row(histogram_, c, 0), p_.columns[c].values * L, 0.0f);
  }

  void rescale(F before, F peak, bool needed, F& total) {
    bool grew = false;
    for (int l = 0; l < L; l++) grew |= before[l] != peak[l];
    if (!needed || !grew) return;
    const F shift = peak == splat<L>(-kInf) ? F{} : peak;
    const F shrink = vexp<L>(before - shift);
    total *= shrink;
    for (int64_t c = 0; c < p_.num_columns; c++)
      for (int v = 0; v < p_.columns[c].values; v++) {
        float* h = row(histogram_, c, v);
        store<L>(h, load<L>(h) * shrink);
      }
  }

  // out[i] = base (or out[i]) + sum over columns c .. c + G - 1 of the row of event i's byte.
  template <int G>
  void gather_columns(const float* table, int64_t c, int64_t at, int n, const F* base, float* out) const {
    const int64_t stride = p_.num_columns;
    const uint8_t* e = p_.events + at * stride + c;
    const float* rows = table + c * kRows * L;
    for (int i = 0; i < n; i++, e += stride) {
      F s = base ? *base : load<L>(out + i * L);
      for (int g = 0; g < G; g++) s += load<L>(rows + (g * kRows + e[g]) * L);
      store<L>(out + i * L, s);
    }
  }

  template <int G>
  void scatter_columns(int64_t c, int64_t at, int n, const float* weights) {
    const int64_t stride = p_.num_columns;
    const uint8_t* e = p_.events + at * stride + c;
    float* rows = histogram_ + c * kRows * L;
    for (int i = 0; i < n; i++, e += stride) {
      const F w = load<L>(weights + i * L);
      for (int g = 0; g < G; g++) {
        float* h = rows + (g * kRows + e[g]) * L;
        store<L>(h, load<L>(h) + w);
      }
    }
  }

  // Columns are taken up to 8 at a time, with the loop over them unrolled.
  void gather(const float* table, int64_t at, int n, F base, float* out) const {
    for (int64_t c = 0; c < p_.num_columns; c += 8) {
      const F* first = c ? nullptr : &base;
      switch (std::min<int64_t>(8, p_.num_columns - c)) {
        case 1: gather_columns<1>(table, c, at, n, first, out); break;
        case 2: gather_columns<2>(table, c, at, n, first, out); break;
        case 3: gather_columns<3>(table, c, at, n, first, out); break;
        case 4: gather_columns<4>(table, c, at, n, first, out); break;
        case 5: gather_columns<5>(table, c, at, n, first, out); break;
        case 6: gather_columns<6>(table, c, at, n, first, out); break;
        case 7: gather_columns<7>(table, c, at, n, first, out); break;
        default: gather_columns<8>(table, c, at, n, first, out);
      }
    }
  }

  void scatter(int64_t at, int n, const float* weights) {
    for (int64_t c = 0; c < p_.num_columns; c += 8) {
      switch (std::min<int64_t>(8, p_.num_columns - c)) {
        case 1: scatter_columns<1>(c, at, n, weights); break;
        case 2: scatter_columns<2>(c, at, n, weights); break;
        case 3: scatter_columns<3>(c, at, n, weights); break;
        case 4: scatter_columns<4>(c, at, n, weights); break;
        case 5: scatter_columns<5>(c, at, n, weights); break;
        case 6: scatter_columns<6>(c, at, n, weights); break;
        case 7: scatter_columns<7>(c, at, n, weights); break;
        default: scatter_columns<8>(c, at, n, weights);
      }
    }
  }

  void add_bias(const Block& b, int64_t at, int n) {
    if (!p_.bias) return;
    for (int i = 0; i < n; i++) {
      const float* bias = p_.bias + (at + i) * p_.bias_heads;
      F v;
      if (p_.bias_heads == 1) {
        v = splat<L>(bias[0]);
      } else {
        for (int l = 0; l < L; l++) v[l] = bias[(b.first + l) % p_.heads];
      }
      store<L>(scores_ + i * L, load<L>(scores_ + i * L) + v);
    }
  }

  void collect_bias(const Block& b, int64_t at, int n, float* grad_bias) {
    for (int i = 0; i < n; i++) {
      float* g = grad_bias + (at + i) * p_.bias_heads;
      for (int l = 0; l < b.lanes; l++) g[(b.first + l) % p_.bias_heads] += scores_[i * L + l];
    }
  }

  // Sum the histogram into features: out[row, f] = scale * sum over bytes of weight times digit.
  void fold(const Block& b, float* out, F scale) {
    for (int64_t c = 0; c < p_.num_columns; c++) {
      const Column& column = p_.columns[c];
      float* h = row(histogram_, c, 0);
      if (!column.width) {
        for (int v = 0; v < column.values; v++) put(b, out, column.start + v, load<L>(h + v * L) * scale);
        continue;
      }
      int size = column.values;
      for (int j = column.width - 1; j >= 0; j--) {  // most significant digit first, then it is summed away
        const int k = column.radices[j];
        size /= k;
        F z = F{};
        for (int d = 0; d < k; d++) {
          F mass = F{};
          for (int r = 0; r < size; r++) {
            const F w = load<L>(h + (d * size + r) * L);
            mass += w;
            if (d) store<L>(h + r * L, load<L>(h + r * L) + w);
          }
          z += mass * (d - 0.5f * (k - 1));
        }
        put(b, out, column.start + j, z * scale);
      }
    }
  }

  void put(const Block& b, float* out, int64_t f, F v) const {
    for (int l = 0; l < b.lanes; l++) out[(b.user * p_.rows + b.first + l) * p_.features + f] = v[l];
  }

  void finish(const Block& b, const ForwardOut& out, F peak, F total) {
    fold(b, out.z, p_.softmax ? 1.0f / at_least_tiny(total) : splat<L>(1.0f));
    for (int l = 0; l < b.lanes; l++) {
      const int64_t at = b.user * p_.rows + b.first + l;
      out.total[at] = total[l];
      out.peak[at] = p_.softmax ? peak[l] : 0.0f;
    }
  }

  const Problem& p_;
  float *scores_, *grads_, *histogram_, *table_[2];
};

// Run `work(worker, block)` over every block of L rows, on several threads, longest histories first.
// With whole_users a user's blocks stay on one thread, which may then add into per-event results.
template <int L, typename Work>
void run(const Problem& p, int tables, bool whole_users, Work work) {
  const int64_t blocks = (p.rows + L - 1) / L;
  const int64_t items = whole_users ? p.users : p.users * blocks;
  const int64_t work_size = (p.offsets[p.users] + 300 * p.users) * p.num_columns * blocks;
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
void dispatch(const Problem& p, int tables, bool whole_users, Work work) {
  if (p.rows <= 4) return run<4>(p, tables, whole_users, work);
  if (p.rows <= 8) return run<8>(p, tables, whole_users, work);
  return run<16>(p, tables, whole_users, work);
}

}  // namespace

extern "C" {

// Floats of scratch that one thread needs.
int64_t sid_scratch_floats(int64_t num_columns, int64_t rows, int64_t tables) {
  const int64_t lanes = rows <= 4 ? 4 : rows <= 8 ? 8 : 16;
  return 2 * kChunkFloats + (1 + tables) * num_columns * kRows * lanes;
}

void sid_attention_forward(const Problem* p, const ForwardOut* out) {
  dispatch(*p, 1, false, [&](auto& worker, const Block& block) { worker.forward(block, *out); });
}

void sid_attention_backward(const Problem* p, const BackwardArgs* args) {
  dispatch(*p, 2, args->grad_bias != nullptr,
           [&](auto& worker, const Block& block) { worker.backward(block, *args); });
}
}
