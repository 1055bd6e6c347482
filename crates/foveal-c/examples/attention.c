/* Causal grouped-query attention through the C interface: forward, backward and one decoded token, each compared with
 * plain loops. Build it from the root of the repository:
 *
 *   cargo build --release -p foveal-c
 *   cc -std=c99 -I crates/foveal-c/include crates/foveal-c/examples/attention.c \
 *      target/release/libfoveal_c.a -o attention -lpthread -ldl -lm && ./attention
 */
#include "foveal.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { BATCH = 2, SEQ = 33, HEADS = 6, KV = 2, KEY_DIM = 20, VALUE_DIM = 12 };

/* One call's tensors, [batch, seq, heads, dim] without gaps. */
typedef struct {
  float *q, *k, *v, *out, *lse, *d_out, *d_q, *d_k, *d_v;
} numbers;

static size_t at(size_t b, size_t t, size_t heads, size_t h, size_t dim) {
  return ((b * SEQ + t) * heads + h) * dim;
}

static float *make(size_t heads, size_t dim, unsigned seed) {
  size_t n = (size_t)BATCH * SEQ * heads * dim;
  float *data = malloc(n * sizeof *data);
  if (data == NULL) {
    fprintf(stderr, "no memory\n");
    exit(1);
  }
  for (size_t i = 0; i < n; i++) {
    seed = seed * 1664525u + 1013904223u;
    data[i] = (float)(seed >> 8) / (float)(1u << 24) * 2.0f - 1.0f;
  }
  return data;
}

static numbers make_all(unsigned seed) {
  numbers x;
  x.q = make(HEADS, KEY_DIM, seed + 1);
  x.k = make(KV, KEY_DIM, seed + 2);
  x.v = make(KV, VALUE_DIM, seed + 3);
  x.out = make(HEADS, VALUE_DIM, seed + 4);
  x.lse = make(HEADS, 1, seed + 5);
  x.d_out = make(HEADS, VALUE_DIM, seed + 6);
  x.d_q = make(HEADS, KEY_DIM, seed + 7);
  x.d_k = make(KV, KEY_DIM, seed + 8);
  x.d_v = make(KV, VALUE_DIM, seed + 9);
  return x;
}

static void free_all(numbers x) {
  float *all[] = {x.q, x.k, x.v, x.out, x.lse, x.d_out, x.d_q, x.d_k, x.d_v};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

static double dot(const float *a, const float *b, size_t n) {
  double sum = 0.0;
  for (size_t i = 0; i < n; i++) sum += (double)a[i] * b[i];
  return sum;
}

/* The weights of query i with the keys 0..i, and the log-sum-exp of its scores. */
static double weigh(const numbers *x, size_t b, size_t h, size_t i, double *weights) {
  const float *q = x->q + at(b, i, HEADS, h, KEY_DIM);
  double sum = 0.0;
  for (size_t j = 0; j <= i; j++) {
    const float *k = x->k + at(b, j, KV, h / (HEADS / KV), KEY_DIM);
    weights[j] = exp(dot(q, k, KEY_DIM) / sqrt((double)KEY_DIM));
    sum += weights[j];
  }
  for (size_t j = 0; j <= i; j++) weights[j] /= sum;
  return log(sum);
}

static void plain_forward(const numbers *x) {
  double weights[SEQ];
  for (size_t b = 0; b < BATCH; b++)
    for (size_t h = 0; h < HEADS; h++)
      for (size_t i = 0; i < SEQ; i++) {
        x->lse[at(b, i, HEADS, h, 1)] = (float)weigh(x, b, h, i, weights);
        for (size_t d = 0; d < VALUE_DIM; d++) {
          double sum = 0.0;
          for (size_t j = 0; j <= i; j++)
            sum += weights[j] * x->v[at(b, j, KV, h / (HEADS / KV), VALUE_DIM) + d];
          x->out[at(b, i, HEADS, h, VALUE_DIM) + d] = (float)sum;
        }
      }
}

/* dV_j += P_ij dO_i;  dS_ij = P_ij (dO_i . V_j - dO_i . O_i);  dQ_i += c dS_ij K_j;  dK_j += c dS_ij Q_i */
static void plain_backward(const numbers *x) {
  double weights[SEQ];
  for (size_t i = 0; i < (size_t)BATCH * SEQ * HEADS * KEY_DIM; i++) x->d_q[i] = 0.0f;
  for (size_t i = 0; i < (size_t)BATCH * SEQ * KV * KEY_DIM; i++) x->d_k[i] = 0.0f;
  for (size_t i = 0; i < (size_t)BATCH * SEQ * KV * VALUE_DIM; i++) x->d_v[i] = 0.0f;
  for (size_t b = 0; b < BATCH; b++)
    for (size_t h = 0; h < HEADS; h++)
      for (size_t i = 0; i < SEQ; i++) {
        size_t own = at(b, i, HEADS, h, VALUE_DIM), query = at(b, i, HEADS, h, KEY_DIM);
        double delta = dot(x->d_out + own, x->out + own, VALUE_DIM);
        weigh(x, b, h, i, weights);
        for (size_t j = 0; j <= i; j++) {
          size_t key = at(b, j, KV, h / (HEADS / KV), KEY_DIM);
          size_t value = at(b, j, KV, h / (HEADS / KV), VALUE_DIM);
          double d_weight = dot(x->d_out + own, x->v + value, VALUE_DIM);
          double d_score = weights[j] * (d_weight - delta) / sqrt((double)KEY_DIM);
          for (size_t d = 0; d < VALUE_DIM; d++)
            x->d_v[value + d] += (float)(weights[j] * x->d_out[own + d]);
          for (size_t d = 0; d < KEY_DIM; d++) {
            x->d_q[query + d] += (float)(d_score * x->k[key + d]);
            x->d_k[key + d] += (float)(d_score * x->q[query + d]);
          }
        }
      }
}

/* Ends the program unless the status is that of success. */
static void expect_ok(foveal_status status, const char *what) {
  if (status != FOVEAL_OK) {
    fprintf(stderr, "%s: status %d: %s\n", what, (int)status, foveal_last_error_message());
    exit(1);
  }
}

static void compare(const char *what, const float *got, const float *expected, size_t n) {
  double worst = 0.0;
  for (size_t i = 0; i < n; i++) {
    double off = fabs((double)got[i] - expected[i]);
    /* Not a number is further off than anything. */
    if (!(off <= worst)) worst = off;
  }
  printf("%-8s differs by at most %.1e\n", what, worst);
  if (!(worst < 2e-5)) {
    fprintf(stderr, "%s: too far off\n", what);
    exit(1);
  }
}

static foveal_tensor view(const float *data, size_t heads, size_t dim) {
  return foveal_tensor_dense(data, FOVEAL_F32, BATCH, SEQ, heads, dim);
}

/* The last token of every sequence: a view into the same memory. */
static foveal_tensor last_token(foveal_tensor tensor) {
  tensor.data = (float *)tensor.data + (SEQ - 1) * tensor.strides[1];
  tensor.shape[1] = 1;
  return tensor;
}

static void gradients(const foveal_attention *attention, const foveal_inputs *inputs,
                      const foveal_results *results, const numbers *x, foveal_workspace *workspace) {
  /* Members that are not named are zero: absent. */
  foveal_upstream upstream = {.d_out = view(x->d_out, HEADS, VALUE_DIM)};
  foveal_gradients into = {.d_q = view(x->d_q, HEADS, KEY_DIM),
                           .d_k = view(x->d_k, KV, KEY_DIM),
                           .d_v = view(x->d_v, KV, VALUE_DIM)};
  expect_ok(foveal_attention_backward(attention, inputs, results, &upstream, &into, workspace),
            "backward");
}

int main(void) {
  numbers ours = make_all(1), plain = make_all(1);
  size_t rows = (size_t)BATCH * SEQ * HEADS, kv_rows = (size_t)BATCH * SEQ * KV;
  plain_forward(&plain);
  plain_backward(&plain);

  foveal_attention attention = foveal_attention_default();
  attention.mask.kind = FOVEAL_MASK_CAUSAL;
  foveal_inputs inputs = {.q = view(ours.q, HEADS, KEY_DIM),
                          .k = view(ours.k, KV, KEY_DIM),
                          .v = view(ours.v, KV, VALUE_DIM)};
  foveal_results results = {.out = view(ours.out, HEADS, VALUE_DIM), .lse = view(ours.lse, HEADS, 1)};
  foveal_workspace *workspace = foveal_workspace_create();

  printf("foveal %s\n", foveal_version());
  expect_ok(foveal_attention_forward(&attention, &inputs, &results, workspace), "forward");
  compare("out", ours.out, plain.out, rows * VALUE_DIM);
  compare("lse", ours.lse, plain.lse, rows);

  gradients(&attention, &inputs, &results, &ours, workspace);
  compare("d_q", ours.d_q, plain.d_q, rows * KEY_DIM);
  compare("d_k", ours.d_k, plain.d_k, kv_rows * KEY_DIM);
  compare("d_v", ours.d_v, plain.d_v, kv_rows * VALUE_DIM);

  /* The last token again, as one that has just been generated; without log-sum-exp, without a workspace. */
  for (size_t i = 0; i < rows * VALUE_DIM; i++) ours.out[i] = plain.out[i];
  for (size_t b = 0; b < BATCH; b++)
    for (size_t i = 0; i < HEADS * VALUE_DIM; i++) ours.out[at(b, SEQ - 1, HEADS, 0, VALUE_DIM) + i] = NAN;
  foveal_inputs step = {.q = last_token(inputs.q), .k = inputs.k, .v = inputs.v};
  foveal_results token = {.out = last_token(results.out)};
  expect_ok(foveal_attention_decode(&attention, &step, &token, NULL), "decode");
  compare("decoded", ours.out, plain.out, rows * VALUE_DIM);

  /* What is wrong is said. */
  inputs.v.shape[1] -= 1;
  foveal_status status = foveal_attention_forward(&attention, &inputs, &results, workspace);
  printf("a wrong shape: status %d: %s\n", (int)status, foveal_last_error_message());
  if (status != FOVEAL_SHAPE_MISMATCH) return 1;

  foveal_workspace_free(workspace);
  free_all(ours);
  free_all(plain);
  return 0;
}
