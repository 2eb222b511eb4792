// A user's events put in order for many rows: equal events merged into one with a multiplicity, and events that
// agree in the columns of few values (action, age) made neighbours, so that those columns cost once per group.
// Where candidates see different parts of the history, an event stays within its part.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

// Events of one user.
struct EventRange {
  const uint8_t* bytes;  // [count, columns]
  int64_t count, columns;
  const float* multiplicity;  // [count] or null
};

struct EventGroup {
  int64_t begin, end;  // events
  int64_t part;        // part of the history: between two limits
  int64_t key;         // first of its values in `group_values`, one per group column
};

class GroupedEvents {
 public:
  std::vector<int> scanned, grouped;  // columns: read per event, and per group
  std::vector<uint8_t> bytes;         // [events, scanned]
  std::vector<float> multiplicity;    // [events]
  std::vector<int64_t> first;         // [events]: the original event, or the first of those merged
  std::vector<EventGroup> groups;
  std::vector<uint8_t> group_values;
  std::vector<int64_t> cuts;       // ascending, distinct limits above 0: ends of the parts
  std::vector<int64_t> part_ends;  // events of the first parts together
  std::vector<uint8_t> heavy;      // [columns]: a value of it is added to so often that rounding would show
  bool weighted = false;

  static constexpr int64_t kOften = 256;

  // `limits` of the user's candidates, or null where each sees all events.
  void fill(const EventRange& e, const int64_t* limits, int64_t candidates) {
    if (limits) {
      for (int64_t c = 0; c < candidates; c++)
        if (limits[c] > 0) cuts.push_back(limits[c]);
      std::sort(cuts.begin(), cuts.end());
      cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
    } else if (e.count) {
      cuts.push_back(e.count);
    }
    merge(e);
    choose_columns(e);
    sort(e);
    count_often(e.columns);
  }

  // Parts that a row with this limit sees.
  int64_t parts(int64_t limit) const {
    return std::upper_bound(cuts.begin(), cuts.end(), limit) - cuts.begin();
  }

 private:
  std::vector<int64_t> part_of_;  // of each merged event
  std::vector<int16_t> ranks_;    // [columns, 256]: place of a value among those that occur
  std::vector<int64_t> counts_;   // values that occur in each group column
  int64_t groups_ = 1;            // that could occur

  void merge(const EventRange& e) {
    const int64_t seen = cuts.empty() ? 0 : cuts.back(), columns = e.columns;
    int bits = 4;
    while ((int64_t(1) << bits) < 2 * seen) bits++;
    std::vector<int32_t> slots(size_t(1) << bits, -1);
    const float* counts = e.multiplicity;
    int64_t part = 0;
    for (int64_t i = 0; i < seen; i++) {
      while (i >= cuts[part]) part++;
      const uint8_t* event = e.bytes + i * columns;
      uint64_t hash = part * 0x9E3779B97F4A7C15ull + 1;
      for (int64_t c = 0; c < columns; c += 8) {
        uint64_t word = 0;
        std::memcpy(&word, event + c, std::min<int64_t>(8, columns - c));
        hash = (hash ^ word) * 0xBF58476D1CE4E5B9ull;
        hash ^= hash >> 29;
      }
      for (uint64_t slot = hash >> (64 - bits);; slot = (slot + 1) & (slots.size() - 1)) {
        const int32_t found = slots[slot];
        if (found < 0) {
          slots[slot] = static_cast<int32_t>(first.size());
          first.push_back(i);
          part_of_.push_back(part);
          multiplicity.push_back(counts ? counts[i] : 1.0f);
          break;
        }
        if (part_of_[found] == part && !std::memcmp(event_at(e, found), event, columns)) {
          multiplicity[found] += counts ? counts[i] : 1.0f;
          break;
        }
      }
    }
    weighted = std::any_of(multiplicity.begin(), multiplicity.end(), [](float m) { return m != 1.0f; });
  }

  const uint8_t* event_at(const EventRange& e, int64_t merged) const { return e.bytes + first[merged] * e.columns; }

  // Columns of the fewest values that occur, as long as a group has 8 events on average.
  void choose_columns(const EventRange& e) {
    const int64_t columns = e.columns, n = first.size();
    ranks_.assign(columns * 256, 0);
    for (int64_t i = 0; i < n; i++)
      for (int64_t c = 0; c < columns; c++) ranks_[c * 256 + event_at(e, i)[c]] = 1;
    std::vector<int64_t> count(columns);
    for (int64_t c = 0; c < columns; c++)  // from whether a value occurs to its place among those that do
      for (int v = 0; v < 256; v++)
        if (ranks_[c * 256 + v]) ranks_[c * 256 + v] = static_cast<int16_t>(count[c]++);
    std::vector<int> order(columns);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return count[a] < count[b]; });
    groups_ = std::max<int64_t>(1, cuts.size());
    for (int c : order) {
      if (groups_ * count[c] * 8 > n || !scanned.empty()) {
        scanned.push_back(c);
        continue;
      }
      grouped.push_back(c);
      counts_.push_back(count[c]);
      groups_ *= count[c];
    }
    std::sort(scanned.begin(), scanned.end());
  }

  void sort(const EventRange& e) {
    const int64_t n = first.size();
    std::vector<int64_t> key(n), start(groups_ + 1, 0);
    for (int64_t i = 0; i < n; i++) {
      key[i] = part_of_[i];
      for (size_t s = 0; s < grouped.size(); s++)
        key[i] = key[i] * counts_[s] + ranks_[grouped[s] * 256 + event_at(e, i)[grouped[s]]];
      start[key[i] + 1]++;
    }
    std::partial_sum(start.begin(), start.end(), start.begin());
    std::vector<int64_t> order(n);
    for (int64_t i = 0; i < n; i++) order[start[key[i]]++] = i;
    std::vector<float> counts(n);
    std::vector<int64_t> sources(n);
    bytes.resize(n * scanned.size());
    uint8_t* out = bytes.data();
    for (int64_t i = 0; i < n; i++) {
      const uint8_t* event = event_at(e, order[i]);
      for (int c : scanned) *out++ = event[c];
      counts[i] = multiplicity[order[i]];
      sources[i] = first[order[i]];
      if (i && key[order[i]] == key[order[i - 1]]) {
        groups.back().end = i + 1;
        continue;
      }
      groups.push_back({i, i + 1, part_of_[order[i]], static_cast<int64_t>(group_values.size())});
      for (int c : grouped) group_values.push_back(event[c]);
    }
    multiplicity.swap(counts);
    first.swap(sources);
    part_ends.assign(cuts.size() + 1, 0);
    for (const EventGroup& group : groups) part_ends[group.part + 1] = group.end;
    for (size_t k = 1; k < part_ends.size(); k++) part_ends[k] = std::max(part_ends[k], part_ends[k - 1]);
  }

  void count_often(int64_t columns) {
    heavy.assign(columns, 0);
    for (size_t s = 0; s < scanned.size(); s++) {
      int64_t times[256] = {};
      for (size_t i = s; i < bytes.size(); i += scanned.size()) times[bytes[i]]++;
      heavy[scanned[s]] = *std::max_element(times, times + 256) > kOften;
    }
    for (size_t s = 0; s < grouped.size(); s++) {
      int64_t times[256] = {};
      for (size_t i = s; i < group_values.size(); i += grouped.size()) times[group_values[i]]++;
      heavy[grouped[s]] = *std::max_element(times, times + 256) > kOften;
    }
  }
};
