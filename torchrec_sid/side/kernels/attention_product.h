// Rows of a user against all its events without an exponential per event: exp(sum_c T_c[byte_c]) is the product of
// exp(T_c[byte_c]), so the tables are exponentiated once per row, minus their maxima. Where the scores' range
// exceeds float32's, `fits` says so, and attention_running.h computes the same.
#pragma once

#include <cmath>
#include <memory>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "attention_problem.h"
#include "grouped_events.h"

// Numbers below float32's normal range become 0 while it lives: they cannot count, and would cost a hundred times.
class FlushTiny {
#if defined(__SSE__)
 public:
  FlushTiny() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushTiny() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

// How far below the sum of the tables' maxima the largest score may be: exp(-40) = 4e-18, and what is smaller by
// another 1e-20 underflows.
constexpr float kRange = 40.0f;

// Whether a sum of weights lost nothing that counts.
inline bool fits(float total) { return total >= 4e-18f && total <= std::numeric_limits<float>::max(); }

template <int L>
class Product {
  typedef typename Lanes<L>::F F;
  typedef Piece<L> V;

 public:
  // A row of the table of a column's value holds what an event multiplies its weight by, what it adds up to and,
  // backward, what it adds to the gradient: neighbours in memory, since they are read together.
  Product(const AttentionProblem& problem, bool backward)
      : p_(problem), coder_(problem.layout), stride_((backward ? 3 : 2) * L) {
    const int64_t columns = p_.layout.count, size = Coder<L>::table_floats(columns);
    scratch_.reset(new float[columns * kRows * stride_ + 2 * size]);
    table_ = scratch_.get();
    carry_ = table_ + columns * kRows * stride_;
    values_ = carry_ + size;
    const float nan = std::numeric_limits<float>::quiet_NaN();
    for (int64_t c = 0; c < columns; c++)
      for (int v = p_.layout.columns[c].values; v < kRows; v++)
        for (int k = 0; k < stride_; k++) at(c, v)[k] = k / L == 1 ? 0.0f : nan;
  }

  // Events first .. last - 1 of the grouped ones.
  void forward(const Block& b, const GroupedEvents& e, int64_t first, int64_t last, const Sums& out) {
    start(b, e);
    const F shift = exponentiate(b) + lane_values(p_.offset, b);
    const F total = scan<false>(e, first, last, splat<L>(1.0f), F{});
    finish(b, e, out);
    for (int l = 0; l < b.lanes; l++) {
      out.total[b.rows[l]] = total[l];
      out.peak[b.rows[l]] = shift[l];
    }
  }

  // As Running::backward. False, and nothing written, where the weights do not fit.
  bool backward(const Block& b, const GroupedEvents& e, int64_t first, int64_t last, const BackwardArgs& args,
                const Sums& out) {
    start(b, e);
    const F shift = exponentiate(b) + lane_values(p_.offset, b);
    F factor = F{};
    for (int l = 0; l < b.lanes; l++) {
      const int64_t row = b.rows[l];
      if (!p_.seen(b.user, row)) continue;
      const float apart = shift[l] - args.peak[row];
      if (!(apart <= kRange && apart >= -kRange)) return false;
      factor[l] = std::exp(apart) / args.total[row];
    }
    coder_.build(values_, nullptr, Rows{args.grad_z, b.rows, b.lanes});
    for (int64_t c = 0; c < p_.layout.count; c++)
      for (int v = 0; v < p_.layout.columns[c].values; v++)
        pieces<L>([&](int k) {
          put_piece<L>(at(c, v) + 2 * L + k, piece<L>(values_ + (c * kRows + v) * L + k));
        });
    const F total = scan<true>(e, first, last, factor, -lane_values(args.delta, b));
    finish(b, e, out);
    for (int l = 0; l < b.lanes; l++) out.total[b.rows[l]] = total[l];
    return true;
  }

 private:
  float* at(int64_t column, int64_t value) const { return table_ + (column * kRows + value) * stride_; }

  void start(const Block& b, const GroupedEvents& e) {
    coder_.use_tables();
    for (int64_t c = 0; c < p_.layout.count; c++) {
      const int values = p_.layout.columns[c].values;
      for (int v = 0; v < values; v++)
        pieces<L>([&](int k) { put_piece<L>(at(c, v) + L + k, V{}); });
      if (e.heavy[c]) std::fill_n(carry_ + c * kRows * L, values * L, 0.0f);
    }
    whole_ = true;
    for (int l = 0; l < L; l++) {
      parts_[l] = l < b.lanes ? e.parts(p_.seen(b.user, b.rows[l])) : 0;
      if (l < b.lanes) whole_ &= parts_[l] == static_cast<int64_t>(e.cuts.size());
    }
  }

  // Exponentials of the parts of a score, minus the largest of each column; returns the sum of these.
  F exponentiate(const Block& b) {
    F shift = F{};
    for (int64_t c = 0; c < p_.layout.count; c++) {
      const EventColumn& column = p_.layout.columns[c];
      if (!column.width) {
        F top = splat<L>(-kInf);
        for (int v = 0; v < column.values; v++) {
          const F x = feature(b, column.start + v);
          store<L>(at(c, v), x);
          top = x > top || x != x ? x : top;
        }
        for (int v = 0; v < column.values; v++) store<L>(at(c, v), vexp<L>(load<L>(at(c, v)) - top));
        shift += top;
        continue;
      }
      store<L>(at(c, 0), splat<L>(1.0f));
      int size = 1;
      for (int j = 0; j < column.width; j++) {  // as Coder::build, with products in the place of sums
        const F a = feature(b, column.start + j);
        const int k = column.radices[j];
        const F top = (a < F{} ? -a : a) * (0.5f * (k - 1));
        shift += top;
        for (int d = k - 1; d >= 0; d--) {
          float step[L];
          store<L>(step, a * (d - 0.5f * (k - 1)) - top);
          pieces<L>([&](int lane) {
            const V e = vexp<kPiece<L>>(piece<L>(step + lane));
            for (int r = 0; r < size; r++)
              put_piece<L>(at(c, d * size + r) + lane, piece<L>(at(c, r) + lane) * e);
          });
        }
        size *= k;
      }
    }
    return shift;
  }

  template <bool Backward>
  F scan(const GroupedEvents& e, int64_t first, int64_t last, F factor, F moved) {
    F total = F{};
    int64_t since = 0;
    auto group = std::upper_bound(e.groups.begin(), e.groups.end(), first,
                                  [](int64_t i, const EventGroup& g) { return i < g.end; });
    for (; group != e.groups.end() && group->begin < last; ++group) {
      F weight = factor, gradient = F{};
      if (!whole_)
        for (int l = 0; l < L; l++) weight[l] = parts_[l] > group->part ? weight[l] : 0.0f;
      const uint8_t* values = e.group_values.data() + group->key;
      for (size_t s = 0; s < e.grouped.size(); s++) {
        weight *= load<L>(at(e.grouped[s], values[s]));
        if (Backward) gradient += load<L>(at(e.grouped[s], values[s]) + 2 * L);
      }
      const int64_t begin = std::max(first, group->begin), end = std::min(last, group->end);
      F mass = F{};
      for (int64_t i = begin; i < end; i += GroupedEvents::kOften) {
        const int64_t n = std::min(GroupedEvents::kOften, end - i);
        mass += dispatch<Backward>(e, i, i + n, weight, gradient, moved);
        since += n;
        if (since >= GroupedEvents::kOften) {
          settle(e);
          since = 0;
        }
      }
      total += mass;
      for (size_t s = 0; s < e.grouped.size(); s++) {
        float* h = at(e.grouped[s], values[s]) + L;
        store<L>(h, load<L>(h) + mass);
      }
    }
    return total;
  }

  template <bool Backward>
  F dispatch(const GroupedEvents& e, int64_t begin, int64_t end, F weight, F gradient, F moved) {
    switch (e.scanned.size()) {  // with the loop over columns unrolled
      case 1: return events<Backward, 1>(e, begin, end, weight, gradient, moved);
      case 2: return events<Backward, 2>(e, begin, end, weight, gradient, moved);
      case 3: return events<Backward, 3>(e, begin, end, weight, gradient, moved);
      case 4: return events<Backward, 4>(e, begin, end, weight, gradient, moved);
      case 5: return events<Backward, 5>(e, begin, end, weight, gradient, moved);
      case 6: return events<Backward, 6>(e, begin, end, weight, gradient, moved);
      default: return events<Backward, 0>(e, begin, end, weight, gradient, moved);
    }
  }

  template <bool Backward, int S>
  F events(const GroupedEvents& e, int64_t begin, int64_t end, F weight, F gradient, F moved) {
    const int count = S ? S : static_cast<int>(e.scanned.size());
    const int64_t stride = stride_;
    float* column[S ? S : 1];
    for (int s = 0; s < S; s++) column[s] = at(e.scanned[s], 0);
    const uint8_t* x = e.bytes.data() + begin * count;
    const float* times = e.weighted ? e.multiplicity.data() : nullptr;
    float first[L], known[L], added[L];
    V mass[L / kPiece<L>] = {};
    store<L>(first, weight);
    store<L>(known, gradient);
    store<L>(added, moved);
    for (int64_t i = begin; i < end; i++, x += count) {
      float* row[S ? S : 1];
      for (int s = 0; s < S; s++) row[s] = column[s] + x[s] * stride;
      const auto row_of = [&](int s) { return S ? row[S ? s : 0] : at(e.scanned[s], x[s]); };
      const float repeated = times ? times[i] : 1.0f;
      pieces<L>([&](int k) {
        V w = piece<L>(first + k) * repeated, g = piece<L>(known + k);
        for (int s = 0; s < count; s++) {
          w *= piece<L>(row_of(s) + k);
          if (Backward) g += piece<L>(row_of(s) + 2 * L + k);
        }
        if (Backward) w *= g + piece<L>(added + k);  // last, as in Running
        mass[k / kPiece<L>] += w;
        for (int s = 0; s < count; s++) {
          float* h = row_of(s) + L + k;
          put_piece<L>(h, piece<L>(h) + w);
        }
      });
    }
    F sum;
    std::memcpy(&sum, mass, sizeof sum);
    return sum;
  }

  // Sums of values that occur often are kept in two steps, so that rounding does not grow with the history.
  void settle(const GroupedEvents& e) {
    for (int64_t c = 0; c < p_.layout.count; c++)
      for (int v = 0; e.heavy[c] && v < p_.layout.columns[c].values; v++) {
        float *h = at(c, v) + L, *carry = carry_ + (c * kRows + v) * L;
        store<L>(carry, load<L>(carry) + load<L>(h));
        store<L>(h, F{});
      }
  }

  void finish(const Block& b, const GroupedEvents& e, const Sums& out) {
    settle(e);
    // The layout in which Coder folds: columns of few values have their sums at kCarry.
    for (int64_t c = 0; c < p_.layout.count; c++) {
      const int values = p_.layout.columns[c].values;
      float* sums = values_ + (c * kRows + (values <= kFew ? kCarry : 0)) * L;
      for (int v = 0; v < values; v++)
        pieces<L>([&](int k) {
          put_piece<L>(sums + v * L + k, piece<L>((e.heavy[c] ? carry_ + (c * kRows + v) * L : at(c, v) + L) + k));
        });
    }
    coder_.fold(values_, splat<L>(1.0f), out.z, Rows{nullptr, b.rows, b.lanes});
  }

  F feature(const Block& b, int64_t f) const {
    F v = F{};
    for (int l = 0; l < b.lanes; l++) v[l] = p_.query[b.rows[l] * p_.layout.features + f];
    return v;
  }

  static F lane_values(const float* values, const Block& b) {
    F v = F{};
    if (values)
      for (int l = 0; l < b.lanes; l++) v[l] = values[b.rows[l]];
    return v;
  }

  const AttentionProblem& p_;
  Coder<L> coder_;
  const int stride_;
  std::unique_ptr<float[]> scratch_;
  float *table_, *carry_, *values_;
  int64_t parts_[L];
  bool whole_ = true;
};
