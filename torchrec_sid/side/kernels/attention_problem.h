// The inputs and outputs of code-space attention, as attention_problem.py describes them.
#pragma once

#include "columns.h"

struct AttentionProblem {
  Layout layout;
  const float* query;           // [rows, features]
  const int64_t* event_starts;  // [users + 1]
  const int64_t* row_starts;    // [users + 1]
  const int64_t* limits;        // [rows / heads] or null
  const float* multiplicity;    // [events] or null
  const float* offset;          // [rows] or null
  const float* bias;            // [events, bias_heads] or null
  int64_t users, heads, bias_heads, softmax, threads;
  int64_t running;  // 1: never by products of exponentials

  int64_t events(int64_t user) const { return event_starts[user + 1] - event_starts[user]; }
  int64_t seen(int64_t user, int64_t row) const { return limits ? limits[row / heads] : events(user); }
};

struct ForwardOut {
  float *z, *total, *peak;
};

struct BackwardArgs {
  const float *grad_z, *grad_total, *delta, *total, *peak;
  float *grad_query, *grad_offset, *grad_bias;  // grad_bias: null where there is no bias
};

// Up to L rows of a user, one per vector lane.
struct Block {
  int64_t user;
  const int64_t* rows;
  int lanes;
  int64_t seen;  // events that any of them sees
};

// What one item of work adds up: sums of the events of one part of a history, per row.
struct Sums {
  float* z;      // [rows, features]: for a softmax not yet divided by the total
  float* total;  // [rows]
  float* peak;   // [rows]
};
