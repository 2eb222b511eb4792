// Pooled cosines of many candidates with one history, one candidate per vector lane.
//
// An inner product with a candidate is a sum over the event's bytes, so it takes one table row per byte, as in
// code-space attention; the length of an event is found once for all candidates, and equal events are merged.
#pragma once

#include <cmath>
#include <memory>

#include "grouped_events.h"
#include "vectors.h"

constexpr int kLanes = 16;   // coordinates, or events of one candidate, at a time
constexpr int kMaxHot = 16;  // temperatures

struct Similarity {
  const uint8_t* candidates;        // [candidates, columns]
  const uint8_t* events;            // [events, columns]
  const int64_t* event_starts;      // [users + 1]
  const int64_t* candidate_starts;  // [users + 1]
  const int64_t* limits;            // [candidates] or null
  const float* multiplicity;        // [events] or null
  const float* labels;              // [events] or null
  const float* table;               // [columns, 256, rank], rank a multiple of 16
  const uint8_t* match;             // [columns or 1, 256, 256]
  const int64_t* levels;            // [columns]
  const float* temperatures;        // [hot]
  const int64_t* bin_of;            // [sum of levels + 1]
  float* sums;                      // [candidates, 2 + hot (+ hot + 1 with labels) + bins], zeros
  float* maxima;                    // [candidates, 1 or 3], -1
  int64_t users, columns, rank, hot, bins, num_sums, num_maxima, prefix, match_shared, threads;

  int64_t events_of(int64_t user) const { return event_starts[user + 1] - event_starts[user]; }
  int64_t seen(int64_t user, int64_t candidate) const { return limits ? limits[candidate] : events_of(user); }

  // Unit vectors of n events or candidates; zero stays zero. Returns their lengths' inverses where asked to.
  void decode(const uint8_t* bytes, int64_t n, float* out, float* inverse = nullptr) const;

  // Levels at which a candidate and an event agree.
  int64_t agreement(const uint8_t* candidate, const uint8_t* event) const {
    int64_t total = 0;
    for (int64_t c = 0; c < columns; c++) {
      const int64_t same = match[((match_shared ? 0 : c) * 256 + candidate[c]) * 256 + event[c]];
      total += same;
      if (prefix && same < levels[c]) break;
    }
    return total;
  }
};

inline float lane_sum(Lanes<kLanes>::F v) {
  // By halves: a chain of 16 dependent additions would cost more than the product it ends.
  Lanes<8>::F a[2];
  std::memcpy(a, &v, sizeof v);
  a[0] += a[1];
  Lanes<4>::F b[2];
  std::memcpy(b, a, sizeof b);
  b[0] += b[1];
  return (b[0][0] + b[0][2]) + (b[0][1] + b[0][3]);
}

inline float larger(float a, float b) { return b > a || b != b ? b : a; }

// R: vectors of 16 coordinates that stay in registers; 0: any number of them.
template <int R>
void decode_all(const Similarity& p, const uint8_t* bytes, int64_t n, float* out, float* inverse) {
  typedef Lanes<kLanes>::F F;
  constexpr int step = R ? R : 1;
  for (int64_t i = 0; i < n; i++, bytes += p.columns, out += p.rank) {
    F square = F{};
    for (int64_t k = 0; k < p.rank; k += step * kLanes) {
      const float* rows = p.table + k;
      F v[step] = {};
      for (int64_t c = 0; c < p.columns; c++, rows += 256 * p.rank)
        for (int j = 0; j < step; j++) v[j] += load<kLanes>(rows + bytes[c] * p.rank + j * kLanes);
      for (int j = 0; j < step; j++) {
        store<kLanes>(out + k + j * kLanes, v[j]);
        square += v[j] * v[j];
      }
    }
    const float norm = std::sqrt(lane_sum(square));
    const float scale = norm > 0 || norm != norm ? 1.0f / norm : 0.0f;
    if (inverse) inverse[i] = scale;
    for (int64_t k = 0; k < p.rank; k += kLanes) store<kLanes>(out + k, load<kLanes>(out + k) * scale);
  }
}

inline void Similarity::decode(const uint8_t* bytes, int64_t n, float* out, float* inverse) const {
  switch (rank / kLanes) {
    case 1: return decode_all<1>(*this, bytes, n, out, inverse);
    case 2: return decode_all<2>(*this, bytes, n, out, inverse);
    case 3: return decode_all<3>(*this, bytes, n, out, inverse);
    case 4: return decode_all<4>(*this, bytes, n, out, inverse);
    case 5: return decode_all<5>(*this, bytes, n, out, inverse);
    case 6: return decode_all<6>(*this, bytes, n, out, inverse);
    default: return decode_all<0>(*this, bytes, n, out, inverse);
  }
}

// A user's events for many candidates: each kind of event once, with its label and the inverse of its length.
struct UserEvents {
  int64_t user = 0;
  GroupedEvents events;        // its columns: those of the SID, then the bytes of the label
  std::vector<uint8_t> bytes;  // [kinds, columns]
  std::vector<float> inverse, label;
  std::vector<int64_t> part;

  void fill(const Similarity& p, int64_t index) {
    user = index;
    const int64_t begin = p.event_starts[user], n = p.events_of(user), columns = p.columns;
    const int64_t extra = p.labels ? sizeof(float) : 0;
    std::vector<uint8_t> keys(n * (columns + extra));
    for (int64_t i = 0; i < n; i++) {
      uint8_t* key = keys.data() + i * (columns + extra);
      std::memcpy(key, p.events + (begin + i) * columns, columns);
      if (extra) std::memcpy(key + columns, p.labels + begin + i, extra);
    }
    const int64_t first = p.candidate_starts[user];
    events.fill({keys.data(), n, columns + extra, p.multiplicity ? p.multiplicity + begin : nullptr},
                p.limits ? p.limits + first : nullptr, p.candidate_starts[user + 1] - first);
    const int64_t kinds = events.first.size();
    bytes.resize(kinds * columns);
    label.resize(kinds);
    inverse.resize(kinds);
    std::vector<float> unit(p.rank);
    for (int64_t i = 0; i < kinds; i++) {
      const int64_t at = begin + events.first[i];
      std::memcpy(bytes.data() + i * columns, p.events + at * columns, columns);
      label[i] = p.labels ? p.labels[at] : 0.0f;
      p.decode(bytes.data() + i * columns, 1, unit.data(), &inverse[i]);
    }
    part.resize(kinds);
    for (const EventGroup& group : events.groups)
      std::fill(part.begin() + group.begin, part.begin() + group.end, group.part);
  }
};

class ManyCandidates {
  static constexpr int L = kNative;
  typedef Lanes<L>::F F;
  typedef Lanes<L>::I I;

  struct Pools {
    F count = F{}, total = F{}, signed_total = F{}, weight[kMaxHot] = {}, labelled[kMaxHot] = {};
    F best = splat<L>(-1.0f), liked = best, disliked = best;
  };

 public:
  explicit ManyCandidates(const Similarity& p) : p_(p), wanted_(L * p.rank), table_(p.columns * 256 * L) {}

  // Candidates first .. first + L - 1 of a user.
  void run(const UserEvents& user, int64_t first) {
    const int64_t begin = p_.candidate_starts[user.user] + first;
    const int lanes = static_cast<int>(std::min<int64_t>(L, p_.candidate_starts[user.user + 1] - begin));
    int64_t most = 0, parts[L] = {};
    for (int l = 0; l < lanes; l++) {
      parts[l] = user.events.parts(p_.seen(user.user, begin + l));
      most = std::max(most, parts[l]);
    }
    const int64_t n = user.events.part_ends[most];
    if (!n) return;
    build(begin, lanes);
    switch (p_.columns) {
      case 1: return pool<1>(user, begin, lanes, parts, n);
      case 5: return pool<5>(user, begin, lanes, parts, n);
      default: return pool<0>(user, begin, lanes, parts, n);
    }
  }

 private:
  // table[column][value][lane]: inner product of what the value adds with a candidate's unit vector.
  void build(int64_t begin, int lanes) {
    std::fill(wanted_.begin(), wanted_.end(), 0.0f);
    std::vector<float> unit(p_.rank);
    for (int l = 0; l < lanes; l++) {
      p_.decode(p_.candidates + (begin + l) * p_.columns, 1, unit.data());
      for (int64_t k = 0; k < p_.rank; k++) wanted_[k * L + l] = unit[k];
    }
    for (int64_t row = 0; row < p_.columns * 256; row++) {
      F v = F{};
      for (int64_t k = 0; k < p_.rank; k++) v += load<L>(wanted_.data() + k * L) * p_.table[row * p_.rank + k];
      store<L>(table_.data() + row * L, v);
    }
  }

  template <int S>
  void pool(const UserEvents& user, int64_t begin, int lanes, const int64_t* parts, int64_t n) {
    const int64_t columns = S ? S : p_.columns;
    Pools all;
    for (int64_t at = 0; at < n; at += 256) {  // in two steps, so that rounding does not grow with the history
      Pools some;
      some.best = all.best, some.liked = all.liked, some.disliked = all.disliked;
      for (int64_t i = at; i < std::min(n, at + 256); i++) {
        const uint8_t* event = user.bytes.data() + i * columns;
        F c = F{};
        for (int64_t s = 0; s < columns; s++) c += load<L>(table_.data() + (s * 256 + event[s]) * L);
        I sees;
        for (int l = 0; l < L; l++) sees[l] = parts[l] > user.part[i] ? -1 : 0;
        add(some, c * user.inverse[i], sees, user.events.multiplicity[i], user.label[i]);
        if (p_.bins) count_agreement(begin, lanes, parts, event, user.part[i], user.events.multiplicity[i]);
      }
      join(all, some);
    }
    write(all, begin, lanes, parts);
  }

  void add(Pools& o, F c, I sees, float times, float label) const {
    const F weight = sees ? splat<L>(times) : F{}, none = splat<L>(-1.0f);
    const F seen = sees ? c : none;
    o.best = (seen > o.best) | (seen != seen) ? seen : o.best;
    for (int t = 0; t < p_.hot; t++) {
      const F w = vexp<L>(p_.temperatures[t] * (c - 1.0f)) * weight;
      o.weight[t] += w;
      o.labelled[t] += w * label;
    }
    o.count += weight;
    o.total += c * weight;
    o.signed_total += c * weight * label;
    if (label > 0) o.liked = seen > o.liked ? seen : o.liked;
    if (label < 0) o.disliked = seen > o.disliked ? seen : o.disliked;
  }

  void join(Pools& all, const Pools& some) const {
    all.count += some.count;
    all.total += some.total;
    all.signed_total += some.signed_total;
    for (int t = 0; t < p_.hot; t++) all.weight[t] += some.weight[t], all.labelled[t] += some.labelled[t];
    all.best = some.best, all.liked = some.liked, all.disliked = some.disliked;
  }

  void write(const Pools& o, int64_t begin, int lanes, const int64_t* parts) const {
    for (int l = 0; l < lanes; l++) {
      if (!parts[l]) continue;
      float *sums = p_.sums + (begin + l) * p_.num_sums, *maxima = p_.maxima + (begin + l) * p_.num_maxima;
      sums[0] = o.count[l];
      sums[1] = o.total[l];
      for (int t = 0; t < p_.hot; t++) sums[2 + t] = o.weight[t][l];
      maxima[0] = o.best[l];
      if (!p_.labels) continue;
      for (int t = 0; t < p_.hot; t++) sums[2 + p_.hot + t] = o.labelled[t][l];
      sums[2 + 2 * p_.hot] = o.signed_total[l];
      maxima[1] = o.liked[l];
      maxima[2] = o.disliked[l];
    }
  }

  void count_agreement(int64_t begin, int lanes, const int64_t* parts, const uint8_t* event, int64_t part,
                       float times) const {
    for (int l = 0; l < lanes; l++) {
      if (parts[l] <= part) continue;
      float* bins = p_.sums + (begin + l + 1) * p_.num_sums - p_.bins;
      bins[p_.bin_of[p_.agreement(p_.candidates + (begin + l) * p_.columns, event)]] += times;
    }
  }

  const Similarity& p_;
  std::vector<float> wanted_, table_;
};
