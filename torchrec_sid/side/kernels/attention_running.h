// Rows of a user against a range of its events with a running softmax over chunks, or with sigmoids: for any scores.
#pragma once

#include <cmath>
#include <memory>

#include "attention_problem.h"

constexpr int kChunkFloats = 4096;  // scores held at a time: 16 KiB, half a first-level cache
constexpr int kWide = 16;           // floats per step where events need not be told apart
typedef Lanes<kWide>::F Wide;

template <int L>
class Running {
  typedef typename Lanes<L>::F F;
  static constexpr int kChunk = kChunkFloats / L;  // events

 public:
  Running(const AttentionProblem& problem, int tables) : p_(problem), coder_(problem.layout) {
    const int64_t size = Coder<L>::table_floats(p_.layout.count);
    scratch_.reset(new float[2 * kChunkFloats + (1 + tables) * size + tables * p_.layout.features * L]);
    scores_ = scratch_.get();
    grads_ = scores_ + kChunkFloats;
    sums_ = grads_ + kChunkFloats;
    float* next = sums_ + size;
    for (int t = 0; t < tables; t++, next += size) {
      table_[t] = next;
      coder_.poison(next);
    }
    for (int t = 0; t < tables; t++, next += p_.layout.features * L) transposed_[t] = next;
  }

  // Events first .. last - 1 of the user.
  void forward(const Block& b, int64_t first, int64_t last, const Sums& out) {
    const int64_t begin = p_.event_starts[b.user];
    start(b, last - first, p_.query);
    F peak = splat<L>(-kInf), total = F{};
    const F base = lane_values(p_.offset, b, 0.0f);
    for (int64_t at = first; at < last; at += kChunk) {
      const int n = static_cast<int>(std::min<int64_t>(kChunk, last - at));
      score(b, begin, at, n, base);
      Wide shift = Wide{};
      if (p_.softmax) {
        const F before = peak;
        peak = largest(n, peak);
        const F origin = peak == splat<L>(-kInf) ? F{} : peak;
        if (at > first && differ(before, peak)) {
          const F factor = vexp<L>(before - origin);
          total *= factor;
          coder_.shrink(sums_, factor);
        }
        shift = repeat(origin);
      }
      const F weights = replace(n, [&](int k) {
        const Wide s = load<kWide>(scores_ + k);
        return p_.softmax ? vexp<kWide>(s - shift) : sigmoid(s);
      });
      total += p_.multiplicity ? multiply(begin + at, n) : weights;
      coder_.scatter(sums_, begin + at, n, scores_);
      coder_.settle(sums_);
    }
    coder_.fold(sums_, splat<L>(1.0f), out.z, Rows{nullptr, b.rows, b.lanes});
    for (int l = 0; l < b.lanes; l++) {
      out.total[b.rows[l]] = total[l];
      out.peak[b.rows[l]] = p_.softmax ? peak[l] : 0.0f;
    }
  }

  // Gradients of those events: sums of p (g - delta), and of their products with the features.
  void backward(const Block& b, int64_t first, int64_t last, const BackwardArgs& args, const Sums& out) {
    const int64_t begin = p_.event_starts[b.user];
    start(b, last - first, p_.query);
    coder_.build(table_[1], transposed_[1], Rows{args.grad_z, b.rows, b.lanes});
    const F base = lane_values(p_.offset, b, 0.0f);
    const F moved = p_.softmax ? -lane_values(args.delta, b, 0.0f) : lane_values(args.grad_total, b, 0.0f);
    F peak = lane_values(args.peak, b, 0.0f);
    peak = peak == splat<L>(-kInf) ? F{} : peak;
    const F inverse = 1.0f / at_least_tiny(lane_values(args.total, b, 1.0f));
    const Wide shift = repeat(peak), scale = repeat(inverse), added = repeat(moved);
    F total = F{};
    for (int64_t at = first; at < last; at += kChunk) {
      const int n = static_cast<int>(std::min<int64_t>(kChunk, last - at));
      score(b, begin, at, n, base);
      coder_.gather(table_[1], transposed_[1], begin + at, n, F{}, grads_);
      pad(grads_, n, 0.0f);
      const F sum = replace(n, [&](int k) {
        // Added last, so that what is left of a cancellation is exact.
        const Wide s = load<kWide>(scores_ + k), g = load<kWide>(grads_ + k) + added;
        if (p_.softmax) return vexp<kWide>(s - shift) * scale * g;
        const Wide w = sigmoid(s);
        return w * (1.0f - w) * g;
      });
      total += p_.multiplicity ? multiply(begin + at, n) : sum;
      coder_.scatter(sums_, begin + at, n, scores_);
      coder_.settle(sums_);
      if (args.grad_bias) collect_bias(b, begin + at, n, args.grad_bias);
    }
    coder_.fold(sums_, splat<L>(1.0f), out.z, Rows{nullptr, b.rows, b.lanes});
    for (int l = 0; l < b.lanes; l++) out.total[b.rows[l]] = total[l];
  }

 private:
  void start(const Block& b, int64_t events, const float* vectors) {
    coder_.plan(events);
    coder_.build(table_[0], transposed_[0], Rows{vectors, b.rows, b.lanes});
    coder_.clear(sums_);
  }

  // Scores of events at .. at + n - 1 of a user whose first is `begin`; -inf where there is nothing to see.
  void score(const Block& b, int64_t begin, int64_t at, int n, F base) {
    coder_.gather(table_[0], transposed_[0], begin + at, n, base, scores_);
    add_bias(b, begin + at, n);
    if (p_.limits)
      for (int l = 0; l < b.lanes; l++)
        for (int64_t i = std::max<int64_t>(0, p_.seen(b.user, b.rows[l]) - at); i < n; i++)
          scores_[i * L + l] = -kInf;
    pad(scores_, n, -kInf);
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

  // Count each event as often as it occurred.
  F multiply(int64_t at, int n) {
    for (int i = 0; i < n; i++)
      store<L>(scores_ + i * L, load<L>(scores_ + i * L) * p_.multiplicity[at + i]);
    pad(scores_, n, 0.0f);
    return sum_of(n, [&](int k) { return load<kWide>(scores_ + k); });
  }

  static bool differ(F a, F b) {
    bool any = false;
    for (int l = 0; l < L; l++) any |= a[l] != b[l];
    return any;
  }

  static F lane_values(const float* values, const Block& b, float otherwise) {
    F v = splat<L>(otherwise);
    if (values)
      for (int l = 0; l < b.lanes; l++) v[l] = values[b.rows[l]];
    return v;
  }

  void add_bias(const Block& b, int64_t at, int n) {
    if (!p_.bias) return;
    for (int i = 0; i < n; i++) {
      const float* bias = p_.bias + (at + i) * p_.bias_heads;
      F v = splat<L>(bias[0]);
      if (p_.bias_heads > 1)
        for (int l = 0; l < b.lanes; l++) v[l] = bias[b.rows[l] % p_.heads];
      store<L>(scores_ + i * L, load<L>(scores_ + i * L) + v);
    }
  }

  void collect_bias(const Block& b, int64_t at, int n, float* grad_bias) const {
    for (int i = 0; i < n; i++) {
      float* g = grad_bias + (at + i) * p_.bias_heads;
      for (int l = 0; l < b.lanes; l++) g[b.rows[l] % p_.bias_heads] += scores_[i * L + l];
    }
  }

  const AttentionProblem& p_;
  Coder<L> coder_;
  std::unique_ptr<float[]> scratch_;
  float *scores_, *grads_, *sums_, *table_[2], *transposed_[2];
};
