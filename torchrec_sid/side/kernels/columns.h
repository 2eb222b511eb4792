// Products of query rows with packed events, and weighted sums of packed events, L rows at a time.
//
// Every column of an event is a byte, so its part of a product is one row of a table of 256, and the weighted
// sum of features is a histogram of weights per column (asymmetric distance computation, made exact). The
// digits themselves appear only when a table is built and when a histogram is folded. Histories too short to
// pay for tables are multiplied out digit by digit instead.
#pragma once

#include <algorithm>
#include <limits>

#include "vectors.h"

constexpr int kRows = 256;  // of every table, whatever the column's alphabet: a byte is always a safe index
constexpr int kMaxDigits = 8;  // a byte holds at most 8 binary digits
// Columns of few values add many weights to each: their sums are kept in two steps, a chunk of events at a
// time, the running ones in the unused rows from kCarry on, so that rounding does not grow with the history.
constexpr int kFew = 64, kCarry = 128;

struct EventColumn {
  int32_t start, values, width, radices[kMaxDigits];  // width 0: one-hot
};

struct Layout {
  const uint8_t* events;     // [events, count]
  const EventColumn* columns;     // [count]
  const float* digits;       // [count or 1, 256, digit_width], NaN outside the alphabet; for digit columns
  int64_t count, features, digit_width, digits_shared;
};

// Vectors of F features each, of which lane l is number rows[l].
struct Rows {
  const float* vectors;
  const int64_t* rows;
  int lanes;
};

template <int L>
class Coder {
  typedef typename Lanes<L>::F F;

 public:
  static int64_t table_floats(int64_t columns) { return columns * kRows * L; }

  explicit Coder(const Layout& layout) : l_(layout) {
    for (int64_t c = 0; c < l_.count; c++) {
      values_ += l_.columns[c].values;
      multiply_ += l_.columns[c].width ? l_.columns[c].width : 1;
    }
  }

  // Choose between tables and digits for a history of n events: to build and fold a table costs per value
  // about what an event costs per digit (25 trits: they break even near 48 events, measured).
  bool pays_for_tables(int64_t n) const { return n * multiply_ >= values_; }
  void plan(int64_t n) { direct_ = !pays_for_tables(n); }
  void use_tables() { direct_ = false; }

  // Rows outside the alphabet are NaN: a corrupt byte makes the result NaN, never a plausible number.
  void poison(float* table) const {
    for (int64_t c = 0; c < l_.count; c++)
      std::fill(row(table, c, l_.columns[c].values), row(table, c + 1, 0),
                std::numeric_limits<float>::quiet_NaN());
  }

  // Make `table` (or, for digits, `transposed`, of features rows) from query rows.
  void build(float* table, float* transposed, const Rows& rows) const {
    if (direct_) {
      for (int64_t f = 0; f < l_.features; f++) store<L>(transposed + f * L, feature(rows, f));
      return;
    }
    for (int64_t c = 0; c < l_.count; c++) {
      const EventColumn& column = l_.columns[c];
      float* t = row(table, c, 0);
      if (!column.width) {
        for (int v = 0; v < column.values; v++) store<L>(t + v * L, feature(rows, column.start + v));
        continue;
      }
      store<L>(t, F{});
      int size = 1;
      for (int j = 0; j < column.width; j++) {
        const F a = feature(rows, column.start + j);
        const int k = column.radices[j];
        for (int d = k - 1; d >= 0; d--) {  // downwards: digit 0 overwrites what the others are made from
          const F step = a * (d - 0.5f * (k - 1));
          for (int r = 0; r < size; r++) store<L>(t + (d * size + r) * L, load<L>(t + r * L) + step);
        }
        size *= k;
      }
    }
  }

  // out[i] = base + product of event at + i with the rows, i < n.
  void gather(const float* table, const float* transposed, int64_t at, int n, F base, float* out) const {
    if (direct_) return gather_digits(transposed, at, n, base, out);
    for (int64_t c = 0; c < l_.count; c += 8) {  // up to 8 columns at a time, with the loop over them unrolled
      const F* first = c ? nullptr : &base;
      switch (std::min<int64_t>(8, l_.count - c)) {
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

  void clear(float* sums) const {
    if (direct_) {
      std::fill_n(sums, l_.features * L, 0.0f);
      return;
    }
    for (int64_t c = 0; c < l_.count; c++) {
      const int values = l_.columns[c].values;
      std::fill_n(row(sums, c, 0), values * L, 0.0f);
      if (values <= kFew) std::fill_n(row(sums, c, kCarry), values * L, 0.0f);
    }
  }

  // End of a chunk of events.
  void settle(float* sums) const {
    if (direct_) return;
    for (int64_t c = 0; c < l_.count; c++)
      for (int v = 0; l_.columns[c].values <= kFew && v < l_.columns[c].values; v++) {
        float *h = row(sums, c, v), *carry = row(sums, c, kCarry + v);
        store<L>(carry, load<L>(carry) + load<L>(h));
        store<L>(h, F{});
      }
  }

  // Add events at .. at + n - 1, times their weights.
  void scatter(float* sums, int64_t at, int n, const float* weights) const {
    if (direct_) return scatter_digits(sums, at, n, weights);
    for (int64_t c = 0; c < l_.count; c += 8) {
      switch (std::min<int64_t>(8, l_.count - c)) {
        case 1: scatter_columns<1>(sums, c, at, n, weights); break;
        case 2: scatter_columns<2>(sums, c, at, n, weights); break;
        case 3: scatter_columns<3>(sums, c, at, n, weights); break;
        case 4: scatter_columns<4>(sums, c, at, n, weights); break;
        case 5: scatter_columns<5>(sums, c, at, n, weights); break;
        case 6: scatter_columns<6>(sums, c, at, n, weights); break;
        case 7: scatter_columns<7>(sums, c, at, n, weights); break;
        default: scatter_columns<8>(sums, c, at, n, weights);
      }
    }
  }

  void shrink(float* sums, F factor) const {
    if (direct_) {
      for (int64_t f = 0; f < l_.features; f++) store<L>(sums + f * L, load<L>(sums + f * L) * factor);
      return;
    }
    for (int64_t c = 0; c < l_.count; c++) {
      float* h = row(sums, c, l_.columns[c].values <= kFew ? kCarry : 0);
      for (int v = 0; v < l_.columns[c].values; v++) store<L>(h + v * L, load<L>(h + v * L) * factor);
    }
  }

  // Write scale times the weighted sums, per feature, into the rows of `out`; uses `sums` up.
  void fold(float* sums, F scale, float* out, const Rows& rows) const {
    if (direct_) {
      for (int64_t f = 0; f < l_.features; f++) put(out, rows, f, load<L>(sums + f * L) * scale);
      return;
    }
    for (int64_t c = 0; c < l_.count; c++) {
      const EventColumn& column = l_.columns[c];
      float* h = row(sums, c, column.values <= kFew ? kCarry : 0);
      if (!column.width) {
        for (int v = 0; v < column.values; v++) put(out, rows, column.start + v, load<L>(h + v * L) * scale);
        continue;
      }
      int size = column.values;
      for (int j = column.width - 1; j >= 0; j--) {  // most significant digit first, then it is summed away
        const int k = column.radices[j];
        size /= k;
        F z = F{};
        pieces<L>([&](int lane) {
          Piece<L> part = Piece<L>{};
          for (int d = 0; d < k; d++) {
            Piece<L> mass = Piece<L>{};
            for (int r = 0; r < size; r++) {
              float* h_r = h + r * L + lane;
              const Piece<L> w = piece<L>(h_r + d * size * L);
              mass += w;
              if (d) put_piece<L>(h_r, piece<L>(h_r) + w);
            }
            part += mass * (d - 0.5f * (k - 1));
          }
          std::memcpy(reinterpret_cast<float*>(&z) + lane, &part, sizeof part);
        });
        put(out, rows, column.start + j, z * scale);
      }
    }
  }

 private:
  static float* row(float* table, int64_t column, int64_t value) { return table + (column * kRows + value) * L; }

  F feature(const Rows& rows, int64_t f) const {
    F v = F{};
    for (int l = 0; l < rows.lanes; l++) v[l] = rows.vectors[rows.rows[l] * l_.features + f];
    return v;
  }

  void put(float* out, const Rows& rows, int64_t f, F v) const {
    for (int l = 0; l < rows.lanes; l++) out[rows.rows[l] * l_.features + f] = v[l];
  }

  template <int G>
  void gather_columns(const float* table, int64_t c, int64_t at, int n, const F* base, float* out) const {
    const uint8_t* e = l_.events + at * l_.count + c;
    const float* rows = table + c * kRows * L;
    for (int i = 0; i < n; i++, e += l_.count) {
      F s = base ? *base : load<L>(out + i * L);
      for (int g = 0; g < G; g++) s += load<L>(rows + (g * kRows + e[g]) * L);
      store<L>(out + i * L, s);
    }
  }

  template <int G>
  void scatter_columns(float* sums, int64_t c, int64_t at, int n, const float* weights) const {
    const uint8_t* e = l_.events + at * l_.count + c;
    float* rows = sums + c * kRows * L;
    for (int i = 0; i < n; i++, e += l_.count) {
      const F w = load<L>(weights + i * L);
      for (int g = 0; g < G; g++) {
        float* h = rows + (g * kRows + e[g]) * L;
        store<L>(h, load<L>(h) + w);
      }
    }
  }

  // Digits of a byte in the rank-th of the digit columns.
  const float* digits_of(int64_t rank, uint8_t byte) const {
    return l_.digits + ((l_.digits_shared ? 0 : rank) * kRows + byte) * l_.digit_width;
  }

  void gather_digits(const float* transposed, int64_t at, int n, F base, float* out) const {
    const uint8_t* e = l_.events + at * l_.count;
    for (int i = 0; i < n; i++, e += l_.count) {
      F s = base;
      for (int64_t c = 0, rank = 0; c < l_.count; c++) {
        const EventColumn& column = l_.columns[c];
        const float* a = transposed + column.start * L;
        if (!column.width) {
          s += e[c] < column.values ? load<L>(a + e[c] * L)
                                    : splat<L>(std::numeric_limits<float>::quiet_NaN());
          continue;
        }
        const float* digits = digits_of(rank++, e[c]);
        for (int j = 0; j < column.width; j++) s += load<L>(a + j * L) * digits[j];
      }
      store<L>(out + i * L, s);
    }
  }

  void scatter_digits(float* sums, int64_t at, int n, const float* weights) const {
    const uint8_t* e = l_.events + at * l_.count;
    for (int i = 0; i < n; i++, e += l_.count) {
      const F w = load<L>(weights + i * L);
      for (int64_t c = 0, rank = 0; c < l_.count; c++) {
        const EventColumn& column = l_.columns[c];
        float* z = sums + column.start * L;
        if (!column.width) {
          if (e[c] < column.values) store<L>(z + e[c] * L, load<L>(z + e[c] * L) + w);
          continue;
        }
        const float* digits = digits_of(rank++, e[c]);
        for (int j = 0; j < column.width; j++) store<L>(z + j * L, load<L>(z + j * L) + w * digits[j]);
      }
    }
  }

  const Layout& l_;
  int64_t values_ = 0, multiply_ = 0;
  bool direct_ = false;
};
