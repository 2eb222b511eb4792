// Pooled cosines of candidates with histories of packed bytes; the mathematics is that of similarity_problem.py.
//
// An event is decoded into the r coordinates of its subspace by adding one table row per byte, scaled to unit
// length, and multiplied with every candidate; the cosines are pooled 16 events at a time.

#include <algorithm>
#include <cmath>

#include "parallel.h"
#include "vectors.h"

namespace {

constexpr int kLanes = 16;
constexpr int kMaxHot = 16;          // temperatures
constexpr int kTileFloats = 1 << 13;  // decoded events held at a time: 32 KiB

typedef Lanes<kLanes>::F F;
typedef Lanes<kLanes>::I I;

struct Similarity {
  const uint8_t* candidates;     // [users, candidates, columns]
  const uint8_t* events;         // [events, columns]
  const int64_t* offsets;        // [users + 1]
  const float* labels;           // [events] or null
  const float* table;            // [columns, 256, rank], rank a multiple of 16
  const uint8_t* match;          // [columns or 1, 256, 256]
  const int64_t* levels;         // [columns]
  const float* temperatures;     // [hot]
  const int64_t* bin_of;         // [sum of levels + 1]
  const int64_t* order;          // users, longest history first
  float* scratch;                // [threads, scratch_floats]
  float* sums;                   // [users, candidates, 2 + hot (+ hot + 1 with labels) + bins], zeros
  float* maxima;                 // [users, candidates, 1 or 3], -1
  int64_t users, per_user, columns, rank, hot, bins, num_sums, num_maxima, prefix, match_shared, threads,
      scratch_floats;
};

inline float lane_sum(F v) {
  // By halves: a chain of 16 dependent additions would cost more than the product it ends.
  Lanes<8>::F a[2];
  std::memcpy(a, &v, sizeof v);
  a[0] += a[1];
  Lanes<4>::F b[2];
  std::memcpy(b, a, sizeof b);
  b[0] += b[1];
  return (b[0][0] + b[0][2]) + (b[0][1] + b[0][3]);
}

inline float lane_max(F v) {
  float s = v[0];
  for (int l = 1; l < kLanes; l++) s = v[l] > s || v[l] != v[l] ? v[l] : s;
  return s;
}

int64_t tile_events(int64_t rank) { return std::max<int64_t>(kLanes, kTileFloats / rank / kLanes * kLanes); }

class User {
 public:
  User(const Similarity& p, float* scratch) : p_(p), tile_(tile_events(p.rank)) {
    units_ = scratch;
    cosine_ = units_ + tile_ * p.rank;
    label_ = cosine_ + tile_;
    wanted_ = label_ + tile_;
  }

  void run(int64_t user) {
    const int64_t begin = p_.offsets[user], end = p_.offsets[user + 1];
    if (begin == end) return;
    decode(p_.candidates + user * p_.per_user * p_.columns, p_.per_user, wanted_);
    for (int64_t at = begin; at < end; at += tile_) {
      const int n = static_cast<int>(std::min(tile_, end - at));
      decode(p_.events + at * p_.columns, n, units_);
      if (p_.labels) {
        std::copy_n(p_.labels + at, n, label_);
        std::fill(label_ + n, label_ + (n + kLanes - 1) / kLanes * kLanes, 0.0f);
      }
      for (int64_t c = 0; c < p_.per_user; c++) {
        const int64_t row = user * p_.per_user + c;
        products(wanted_ + c * p_.rank, n);
        pool(n, p_.sums + row * p_.num_sums, p_.maxima + row * p_.num_maxima);
        if (p_.bins) count_agreement(p_.candidates + row * p_.columns, at, n, p_.sums + row * p_.num_sums);
      }
    }
  }

 private:
  // Unit vectors of events or candidates; zero stays zero, a byte outside the alphabet gives NaN.
  void decode(const uint8_t* bytes, int64_t n, float* out) const {
    switch (p_.rank / kLanes) {  // ranks of up to 96 stay in registers
      case 1: return decode_all<1>(bytes, n, out);
      case 2: return decode_all<2>(bytes, n, out);
      case 3: return decode_all<3>(bytes, n, out);
      case 4: return decode_all<4>(bytes, n, out);
      case 5: return decode_all<5>(bytes, n, out);
      case 6: return decode_all<6>(bytes, n, out);
      default: return decode_all<0>(bytes, n, out);
    }
  }

  template <int R>
  void decode_all(const uint8_t* bytes, int64_t n, float* out) const {
    constexpr int step = R ? R : 1;
    for (int64_t i = 0; i < n; i++, bytes += p_.columns, out += p_.rank) {
      F square = F{};
      for (int64_t k = 0; k < p_.rank; k += step * kLanes) {
        const float* rows = p_.table + k;
        F v[step] = {};
        for (int64_t c = 0; c < p_.columns; c++, rows += 256 * p_.rank)
          for (int j = 0; j < step; j++) v[j] += load<kLanes>(rows + bytes[c] * p_.rank + j * kLanes);
        for (int j = 0; j < step; j++) {
          store<kLanes>(out + k + j * kLanes, v[j]);
          square += v[j] * v[j];
        }
      }
      scale_to_unit(square, out);
    }
  }

  void scale_to_unit(F square, float* out) const {
    const float norm = std::sqrt(lane_sum(square));
    const float scale = norm > 0 || norm != norm ? 1.0f / norm : 0.0f;
    for (int64_t k = 0; k < p_.rank; k += kLanes) store<kLanes>(out + k, load<kLanes>(out + k) * scale);
  }

  void products(const float* wanted, int n) {
    for (int i = 0; i < n; i++) {
      F v = F{};
      for (int64_t k = 0; k < p_.rank; k += kLanes)
        v += load<kLanes>(wanted + k) * load<kLanes>(units_ + i * p_.rank + k);
      cosine_[i] = lane_sum(v);
    }
  }

  void pool(int n, float* sums, float* maxima) {
    const int hot = static_cast<int>(p_.hot);
    F total = F{}, signed_total = F{}, weight[kMaxHot] = {}, labelled[kMaxHot] = {};
    F best = splat<kLanes>(-1.0f), liked = best, disliked = best;
    const F none = best, zero = F{};
    for (int i = 0; i < n; i += kLanes) {
      F c = load<kLanes>(cosine_ + i);
      I inside;
      for (int l = 0; l < kLanes; l++) inside[l] = i + l < n ? -1 : 0;
      c = inside ? c : none;
      best = (c > best) | (c != c) ? c : best;
      const F y = p_.labels ? load<kLanes>(label_ + i) : zero;
      for (int t = 0; t < hot; t++) {
        const F w = inside ? vexp<kLanes>(p_.temperatures[t] * (c - 1.0f)) : zero;
        weight[t] += w;
        labelled[t] += w * y;
      }
      total += inside ? c : zero;
      if (!p_.labels) continue;
      signed_total += c * y;
      const F up = y > 0.0f ? c : none, down = y < 0.0f ? c : none;
      liked = up > liked ? up : liked;
      disliked = down > disliked ? down : disliked;
    }
    sums[0] += n;
    sums[1] += lane_sum(total);
    for (int t = 0; t < hot; t++) sums[2 + t] += lane_sum(weight[t]);
    maxima[0] = larger(maxima[0], lane_max(best));
    if (!p_.labels) return;
    for (int t = 0; t < hot; t++) sums[2 + hot + t] += lane_sum(labelled[t]);
    sums[2 + 2 * hot] += lane_sum(signed_total);
    maxima[1] = larger(maxima[1], lane_max(liked));
    maxima[2] = larger(maxima[2], lane_max(disliked));
  }

  static float larger(float a, float b) { return b > a || b != b ? b : a; }

  void count_agreement(const uint8_t* candidate, int64_t at, int n, float* sums) const {
    float* bins = sums + p_.num_sums - p_.bins;
    for (int i = 0; i < n; i++) {
      const uint8_t* event = p_.events + (at + i) * p_.columns;
      int64_t agreement = 0;
      for (int64_t c = 0; c < p_.columns; c++) {
        const int64_t kind = p_.match_shared ? 0 : c;
        const int64_t same = p_.match[(kind * 256 + candidate[c]) * 256 + event[c]];
        agreement += same;
        if (p_.prefix && same < p_.levels[c]) break;
      }
      bins[p_.bin_of[agreement]] += 1.0f;
    }
  }

  const Similarity& p_;
  const int64_t tile_;
  float *units_, *cosine_, *label_, *wanted_;
};

}  // namespace

extern "C" {

// Floats of scratch that one thread needs.
int64_t sid_similarity_scratch(int64_t rank, int64_t per_user) {
  return tile_events(rank) * (rank + 2) + per_user * rank + 2 * kLanes;
}

void sid_similarity(const Similarity* p) {
  const int64_t work = p->offsets[p->users] * (p->columns * p->rank / kLanes + 10 * p->per_user);
  run_parallel(p->threads, p->users, work, [&](int64_t thread, auto next) {
    User worker(*p, p->scratch + thread * p->scratch_floats);
    for (int64_t item = next(); item < p->users; item = next()) worker.run(p->order[item]);
  });
}
}
