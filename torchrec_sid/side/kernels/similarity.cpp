// Pooled cosines of candidates with histories of packed bytes; the mathematics is that of similarity_problem.py.
//
// For few candidates an event is decoded into the r coordinates of its subspace by adding one table row per byte,
// scaled to unit length, and multiplied with every candidate; the cosines are pooled 16 events at a time. For many
// candidates see similarity_lanes.h.

#include "parallel.h"
#include "similarity_lanes.h"

namespace {

constexpr int kTileFloats = 1 << 13;  // decoded events held at a time: 32 KiB
constexpr int64_t kManyCandidates = kNative;

typedef Lanes<kLanes>::F F;
typedef Lanes<kLanes>::I I;

inline float lane_max(F v) {
  float s = v[0];
  for (int l = 1; l < kLanes; l++) s = v[l] > s || v[l] != v[l] ? v[l] : s;
  return s;
}

inline int64_t tile_events(int64_t rank) {
  return std::max<int64_t>(kLanes, kTileFloats / rank / kLanes * kLanes);
}

class FewCandidates {
 public:
  explicit FewCandidates(const Similarity& p) : p_(p), tile_(tile_events(p.rank)) {
    units_.reset(new float[tile_ * p.rank + 3 * tile_]);
    cosine_ = units_.get() + tile_ * p.rank;
    label_ = cosine_ + tile_;
    times_ = label_ + tile_;
  }

  void run(int64_t user) {
    const int64_t begin = p_.event_starts[user], end = p_.event_starts[user + 1];
    const int64_t first = p_.candidate_starts[user], count = p_.candidate_starts[user + 1] - first;
    if (begin == end || !count) return;
    wanted_.resize(count * p_.rank);
    p_.decode(p_.candidates + first * p_.columns, count, wanted_.data());
    for (int64_t at = begin; at < end; at += tile_) {
      const int whole = static_cast<int>(std::min(tile_, end - at));
      p_.decode(p_.events + at * p_.columns, whole, units_.get());
      copy(p_.labels, at, whole, 1.0f, label_);
      copy(p_.multiplicity, at, whole, 1.0f, times_);
      for (int64_t c = 0; c < count; c++) {
        const int64_t row = first + c;
        const int n = static_cast<int>(std::min<int64_t>(whole, p_.seen(user, row) - (at - begin)));
        if (n <= 0) continue;
        products(wanted_.data() + c * p_.rank, n);
        pool(n, p_.sums + row * p_.num_sums, p_.maxima + row * p_.num_maxima);
        if (p_.bins) count_agreement(p_.candidates + row * p_.columns, at, n, p_.sums + row * p_.num_sums);
      }
    }
  }

 private:
  static void copy(const float* values, int64_t at, int n, float otherwise, float* out) {
    for (int i = 0; i < n; i++) out[i] = values ? values[at + i] : otherwise;
    std::fill(out + n, out + (n + kLanes - 1) / kLanes * kLanes, 0.0f);
  }

  void products(const float* wanted, int n) {
    for (int i = 0; i < n; i++) {
      F v = F{};
      for (int64_t k = 0; k < p_.rank; k += kLanes)
        v += load<kLanes>(wanted + k) * load<kLanes>(units_.get() + i * p_.rank + k);
      cosine_[i] = lane_sum(v);
    }
  }

  void pool(int n, float* sums, float* maxima) {
    const int hot = static_cast<int>(p_.hot);
    F count = F{}, total = F{}, signed_total = F{}, weight[kMaxHot] = {}, labelled[kMaxHot] = {};
    F best = splat<kLanes>(-1.0f), liked = best, disliked = best;
    const F none = best, zero = F{};
    for (int i = 0; i < n; i += kLanes) {
      F c = load<kLanes>(cosine_ + i);
      I inside;
      for (int l = 0; l < kLanes; l++) inside[l] = i + l < n ? -1 : 0;
      c = inside ? c : none;
      best = (c > best) | (c != c) ? c : best;
      const F y = load<kLanes>(label_ + i), times = inside ? load<kLanes>(times_ + i) : zero;
      for (int t = 0; t < hot; t++) {
        const F w = vexp<kLanes>(p_.temperatures[t] * (c - 1.0f)) * times;
        weight[t] += w;
        labelled[t] += w * y;
      }
      count += times;
      total += c * times;
      if (!p_.labels) continue;
      signed_total += c * y * times;
      const F up = inside & (y > 0.0f) ? c : none, down = inside & (y < 0.0f) ? c : none;
      liked = up > liked ? up : liked;
      disliked = down > disliked ? down : disliked;
    }
    sums[0] += lane_sum(count);
    sums[1] += lane_sum(total);
    for (int t = 0; t < hot; t++) sums[2 + t] += lane_sum(weight[t]);
    maxima[0] = larger(maxima[0], lane_max(best));
    if (!p_.labels) return;
    for (int t = 0; t < hot; t++) sums[2 + hot + t] += lane_sum(labelled[t]);
    sums[2 + 2 * hot] += lane_sum(signed_total);
    maxima[1] = larger(maxima[1], lane_max(liked));
    maxima[2] = larger(maxima[2], lane_max(disliked));
  }

  void count_agreement(const uint8_t* candidate, int64_t at, int n, float* sums) const {
    float* bins = sums + p_.num_sums - p_.bins;
    for (int i = 0; i < n; i++) {
      const int64_t agreement = p_.agreement(candidate, p_.events + (at + i) * p_.columns);
      bins[p_.bin_of[agreement]] += times_[i];
    }
  }

  const Similarity& p_;
  const int64_t tile_;
  std::unique_ptr<float[]> units_;
  std::vector<float> wanted_;
  float *cosine_, *label_, *times_;
};

}  // namespace

extern "C" {

void sid_similarity(const Similarity* p) {
  std::vector<int64_t> few, many;
  std::vector<std::pair<int64_t, int64_t>> blocks;  // of many candidates: user, first candidate
  for (int64_t user = 0; user < p->users; user++) {
    const int64_t count = p->candidate_starts[user + 1] - p->candidate_starts[user];
    (count < kManyCandidates ? few : many).push_back(user);
    for (int64_t c = 0; c < count && count >= kManyCandidates; c += kNative) blocks.push_back({many.size() - 1, c});
  }
  const auto longer = [&](int64_t a, int64_t b) { return p->events_of(a) > p->events_of(b); };
  std::stable_sort(few.begin(), few.end(), longer);
  const int64_t work = p->event_starts[p->users] * (p->columns * p->rank / kLanes + 10);
  run_parallel(p->threads, few.size(), work, [&](int64_t, auto next) {
    FewCandidates worker(*p);
    for (int64_t item = next(); item < static_cast<int64_t>(few.size()); item = next()) worker.run(few[item]);
  });
  std::vector<UserEvents> users(many.size());
  run_parallel(p->threads, many.size(), work, [&](int64_t, auto next) {
    for (int64_t item = next(); item < static_cast<int64_t>(many.size()); item = next())
      users[item].fill(*p, many[item]);
  });
  run_parallel(p->threads, blocks.size(), work * kManyCandidates, [&](int64_t, auto next) {
    ManyCandidates worker(*p);
    for (int64_t item = next(); item < static_cast<int64_t>(blocks.size()); item = next())
      worker.run(users[blocks[item].first], blocks[item].second);
  });
}
}
