/* What a decoder layer of the Llama kind computes between its matrix products, on a CPU (see
 * kernels.py).
 *
 * Compiled when a model is loaded, for its dtype and the shape of its heads:
 *   HEAD_DIM   width of a head
 *   GROUP      query heads that share a key head
 *   BFLOAT16   if defined, numbers are bfloat16, else float; sums are float in either case
 *
 * Nothing is allocated, and nothing is read or written beyond what the arguments say. Must never be
 * compiled with the assumption that all numbers are finite: NaN and infinity tell the engine that a
 * model is broken.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef BFLOAT16
typedef uint16_t number;

static inline float get(number value)
{
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

static inline number put(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits += 0x7fff + ((bits >> 16) & 1);
    return value == value ? (number)(bits >> 16) : (number)0x7fc0;
}
#else
typedef float number;

static inline float get(number value) { return value; }
static inline number put(float value) { return value; }
#endif

/* Keys and values of this many tokens stay in the processor's cache. */
enum { BLOCK = 128 };

/* exp(x) for x <= 0, accurate to two units in the last place (Cephes' polynomial). */
static inline float exp_below(float x)
{
    x = x < -87.0f ? -87.0f : x;
    float whole = rintf(x * 1.44269504088896341f);
    float rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    int32_t bits = (int32_t)((uint32_t)((int32_t)whole + 127) << 23);
    float power;
    memcpy(&power, &bits, sizeof power);
    return sum * power;
}

/* The largest of `numbers` and `peak`. Written in lanes, because compilers must not reorder such
 * comparisons if a number may be NaN. */
static inline float largest(const float *numbers, long count, float peak)
{
    float peaks[16];
    for (long i = 0; i < 16; i++)
        peaks[i] = peak;
    long at = 0;
    for (; at + 16 <= count; at += 16)
        for (long i = 0; i < 16; i++)
            peaks[i] = numbers[at + i] > peaks[i] ? numbers[at + i] : peaks[i];
    for (; at < count; at++)
        peaks[0] = numbers[at] > peaks[0] ? numbers[at] : peaks[0];
    for (long i = 0; i < 16; i++)
        peak = peaks[i] > peak ? peaks[i] : peak;
    return peak;
}

/* One step of an online softmax: replaces scores by exp(score - `most`), where `most` is the largest
 * score so far, and adds them to `whole`, the sum so far. Returns the factor by which everything
 * accumulated before must be multiplied. */
static inline float to_shares(float *scores, long count, float *most, float *whole)
{
    if (!count)
        return 1.0f;
    float peak = largest(scores, count, *most), sum = 0.0f;
    float kept = *whole > 0.0f ? exp_below(*most - peak) : 0.0f;
    for (long at = 0; at < count; at++) {
        scores[at] = exp_below(scores[at] - peak);
        sum += scores[at];
    }
    *most = peak;
    *whole = *whole * kept + sum;
    return kept;
}

static inline float score(const float *query, const number *key)
{
    float sum = 0.0f;
    for (long i = 0; i < HEAD_DIM; i++)
        sum += query[i] * get(key[i]);
    return sum;
}

/* seen [HEAD_DIM] = seen * kept + the sum of shares [count] times values [count, HEAD_DIM], whose
 * rows are `width` numbers apart. */
static inline void add_values(
    float *seen, float kept, const float *shares, const number *values, long width, long count)
{
    float result[HEAD_DIM];
    for (long i = 0; i < HEAD_DIM; i++)
        result[i] = seen[i] * kept;
    for (long at = 0; at < count; at++, values += width)
        for (long i = 0; i < HEAD_DIM; i++)
            result[i] += shares[at] * get(values[i]);
    memcpy(seen, result, sizeof result);
}

static inline void norm_row(
    number *out, const number *in, const number *weight, long size, float epsilon)
{
    float squares = 0.0f;
    for (long i = 0; i < size; i++)
        squares += get(in[i]) * get(in[i]);
    float factor = 1.0f / sqrtf(squares / (float)size + epsilon);
    for (long i = 0; i < size; i++)
        out[i] = put(get(put(get(in[i]) * factor)) * get(weight[i]));
}

/* RMSNorm of rows [rows, size]. */
void norm(
    number *out, const number *in, const number *weight, long rows, long size, float epsilon,
    long threads)
{
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows > 64)
    for (long row = 0; row < rows; row++)
        norm_row(out + row * size, in + row * size, weight, size, epsilon);
}

/* Normalises one token's query and key heads, if the model has such norms, and rotates them by
 * turns [HEAD_DIM / 2][2] (cosine and sine). */
static inline void turn_heads(
    number *token, const float *turns, long key_heads, const number *query_norm,
    const number *key_norm, float epsilon)
{
    for (long head = 0; head < (GROUP + 1) * key_heads; head++) {
        number *pairs = token + head * HEAD_DIM;
        const number *own_norm = head < GROUP * key_heads ? query_norm : key_norm;
        if (own_norm)
            norm_row(pairs, pairs, own_norm, HEAD_DIM, epsilon);
        for (long i = 0; i < HEAD_DIM; i += 2) {
            float real = get(pairs[i]), other = get(pairs[i + 1]);
            pairs[i] = put(real * turns[i] - other * turns[i + 1]);
            pairs[i + 1] = put(real * turns[i + 1] + other * turns[i]);
        }
    }
}

/* Attention of one token's queries [key_heads, GROUP, HEAD_DIM] to keys and values
 * [length, key_heads, HEAD_DIM]. */
static void attend_token(
    number *out, const number *queries, const number *keys, const number *values, long length,
    long key_heads, float scale)
{
    long heads = GROUP * key_heads, width = key_heads * HEAD_DIM;
    float asked[heads][HEAD_DIM], seen[heads][HEAD_DIM], scores[heads][BLOCK];
    float most[heads], whole[heads];
    for (long head = 0; head < heads; head++) {
        for (long i = 0; i < HEAD_DIM; i++) {
            asked[head][i] = get(queries[head * HEAD_DIM + i]) * scale;
            seen[head][i] = 0.0f;
        }
        most[head] = -INFINITY;
        whole[head] = 0.0f;
    }
    for (long first = 0; first < length; first += BLOCK) {
        long count = length - first < BLOCK ? length - first : BLOCK;
        for (long at = 0; at < count; at++)
            for (long head = 0; head < key_heads; head++) {
                const number *key = keys + (first + at) * width + head * HEAD_DIM;
                for (long i = head * GROUP; i < (head + 1) * GROUP; i++)
                    scores[i][at] = score(asked[i], key);
            }
        for (long head = 0; head < heads; head++) {
            float kept = to_shares(scores[head], count, &most[head], &whole[head]);
            add_values(
                seen[head], kept, scores[head], values + first * width + head / GROUP * HEAD_DIM,
                width, count);
        }
    }
    for (long head = 0; head < heads; head++)
        for (long i = 0; i < HEAD_DIM; i++)
            out[head * HEAD_DIM + i] = put(seen[head][i] / whole[head]);
}

/* The part of a matrix product that is computed in registers: ROWS rows of WIDE numbers. */
#if defined(__AVX512F__)
enum { LANES = 16, ROWS = 8 };
#elif defined(__AVX__)
enum { LANES = 8, ROWS = 4 };
#else
enum { LANES = 4, ROWS = 8 };
#endif
enum { WIDE = 2 * LANES };
typedef float lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));

/* sums [ROWS, WIDE] += left [ROWS, depth] times right [depth, WIDE]. Each is a part of a matrix whose
 * rows are `*_width` numbers apart. */
static inline void add_tile(
    float *sums, long sums_width, const float *left, long left_width, const float *right,
    long right_width, long depth)
{
    lanes own[ROWS][2];
#pragma GCC unroll 8
    for (long row = 0; row < ROWS; row++) {
        own[row][0] = *(lanes *)(sums + row * sums_width);
        own[row][1] = *(lanes *)(sums + row * sums_width + LANES);
    }
    for (long at = 0; at < depth; at++) {
        lanes one = *(const lanes *)(right + at * right_width);
        lanes two = *(const lanes *)(right + at * right_width + LANES);
#pragma GCC unroll 8
        for (long row = 0; row < ROWS; row++) {
            own[row][0] += left[row * left_width + at] * one;
            own[row][1] += left[row * left_width + at] * two;
        }
    }
#pragma GCC unroll 8
    for (long row = 0; row < ROWS; row++) {
        *(lanes *)(sums + row * sums_width) = own[row][0];
        *(lanes *)(sums + row * sums_width + LANES) = own[row][1];
    }
}

enum {
    /* Queries of one key head that are computed together, and the tokens to which they belong. */
    ASKED = GROUP > 64 ? GROUP : 64,
    TOKENS = ASKED / GROUP,
    ASKED_ROWS = (ASKED + ROWS - 1) / ROWS * ROWS,
    WIDTH = (HEAD_DIM + WIDE - 1) / WIDE * WIDE,
};

/* The cache of one key head: tokens are `width` numbers apart, and rows `capacity` tokens. */
struct rows {
    const number *keys, *values;
    long width, capacity;
};

/* Attention of `tokens` tokens, at most TOKENS, for one key head. `queries` and `out` point to the
 * first token's; those of the next token are `query_width` and `out_width` numbers further. All
 * tokens attend to the first `end` keys of row `cache_row`. With `own_rows`, each then attends to
 * the keys of its own row from there up to its place; without, they are the last tokens of those
 * `end`, and each attends to none after itself. */
static void attend_block(
    number *out, long out_width, const number *queries, long query_width, struct rows cache,
    long cache_row, long end, long tokens, const int64_t *own_rows, const int64_t *places,
    float scale)
{
    long width = cache.width, row_size = cache.capacity * width;
    const number *keys = cache.keys + cache_row * row_size;
    const number *values = cache.values + cache_row * row_size;
    float asked[ASKED_ROWS][HEAD_DIM], seen[ASKED_ROWS][WIDTH], scores[ASKED_ROWS][BLOCK];
    float key_columns[HEAD_DIM][BLOCK], value_rows[BLOCK][WIDTH];
    float most[ASKED_ROWS], whole[ASKED_ROWS];
    long count = tokens * GROUP, rows = (count + ROWS - 1) / ROWS * ROWS;
    long start = own_rows ? end : end - tokens;
    memset(seen, 0, sizeof seen);
    memset(value_rows, 0, sizeof value_rows);
    for (long row = 0; row < rows; row++) {
        const number *query = queries + row / GROUP * query_width + row % GROUP * HEAD_DIM;
        for (long i = 0; i < HEAD_DIM; i++)
            asked[row][i] = row < count ? get(query[i]) * scale : 0.0f;
        most[row] = -INFINITY;
        whole[row] = 0.0f;
    }
    for (long first = 0; first < end; first += BLOCK) {
        long filled = end - first < BLOCK ? end - first : BLOCK;
        long columns = (filled + WIDE - 1) / WIDE * WIDE;
        for (long at = 0; at < columns; at++) {
            const number *key = keys + (first + at) * width, *value = values + (first + at) * width;
            for (long i = 0; i < HEAD_DIM; i++) {
                key_columns[i][at] = at < filled ? get(key[i]) : 0.0f;
                value_rows[at][i] = at < filled ? get(value[i]) : 0.0f;
            }
        }
        memset(scores, 0, sizeof scores);
        for (long at = 0; at < columns; at += WIDE)
            for (long row = 0; row < rows; row += ROWS)
                add_tile(
                    &scores[row][at], BLOCK, asked[row], HEAD_DIM, &key_columns[0][at], BLOCK,
                    HEAD_DIM);
        for (long row = 0; row < count; row++) {
            /* No token attends to one after itself. */
            long visible = start + row / GROUP + 1 - first;
            visible = visible < 0 ? 0 : visible < filled ? visible : filled;
            float kept = to_shares(scores[row], visible, &most[row], &whole[row]);
            for (long at = visible; at < columns; at++)
                scores[row][at] = 0.0f;
            for (long i = 0; i < WIDTH; i++)
                seen[row][i] *= kept;
        }
        for (long i = 0; i < WIDTH; i += WIDE)
            for (long row = 0; row < rows; row += ROWS)
                add_tile(
                    &seen[row][i], WIDTH, scores[row], BLOCK, &value_rows[0][i], WIDTH, filled);
    }
    for (long row = 0; own_rows && row < count; row++) {
        const number *own_keys = cache.keys + own_rows[row / GROUP] * row_size;
        const number *own_values = cache.values + own_rows[row / GROUP] * row_size;
        for (long first = end; first <= places[row / GROUP]; first += BLOCK) {
            long filled = places[row / GROUP] + 1 - first;
            filled = filled < BLOCK ? filled : BLOCK;
            for (long at = 0; at < filled; at++)
                scores[row][at] = score(asked[row], own_keys + (first + at) * width);
            float kept = to_shares(scores[row], filled, &most[row], &whole[row]);
            add_values(seen[row], kept, scores[row], own_values + first * width, width, filled);
        }
    }
    for (long row = 0; row < count; row++)
        for (long i = 0; i < HEAD_DIM; i++)
            out[row / GROUP * out_width + row % GROUP * HEAD_DIM + i] =
                put(seen[row][i] / whole[row]);
}

/* Normalises and rotates the queries and keys of token_heads [tokens, (GROUP + 2) * key_heads,
 * HEAD_DIM] in place by turns [tokens, HEAD_DIM / 2, 2], and stores each token's keys and values at
 * its row and place in the caches [rows, capacity, key_heads, HEAD_DIM]. */
void store(
    number *token_heads, const float *turns, number *keys, number *values, const int64_t *rows,
    const int64_t *places, long tokens, long capacity, long key_heads, const number *query_norm,
    const number *key_norm, float epsilon, long threads)
{
    long size = (GROUP + 2) * key_heads * HEAD_DIM, width = key_heads * HEAD_DIM;
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens > 64)
    for (long token = 0; token < tokens; token++) {
        number *own = token_heads + token * size;
        turn_heads(own, turns + token * HEAD_DIM, key_heads, query_norm, key_norm, epsilon);
        long place = (rows[token] * capacity + places[token]) * width;
        memcpy(keys + place, own + GROUP * width, (size_t)width * sizeof(number));
        memcpy(values + place, own + (GROUP + 1) * width, (size_t)width * sizeof(number));
    }
}

/* Attention of tokens one by one, after `store`, each to its row up to itself. Writes to
 * out [tokens, GROUP * key_heads, HEAD_DIM]. */
void attend(
    number *out, const number *token_heads, const number *keys, const number *values,
    const int64_t *rows, const int64_t *places, long tokens, long capacity, long key_heads,
    float scale, long threads)
{
    long size = (GROUP + 2) * key_heads * HEAD_DIM, width = key_heads * HEAD_DIM;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && tokens > 1)
    for (long token = 0; token < tokens; token++) {
        long row = rows[token] * capacity * width;
        attend_token(
            out + token * GROUP * width, token_heads + token * size, keys + row, values + row,
            places[token] + 1, key_heads, scale);
    }
}

/* Attention in blocks. The tokens are the last of the first `end` tokens of row `row`; or, with
 * `own_rows` and `places`, all attend to those `end` tokens, and then to the rest of their own rows
 * up to themselves. */
void attend_together(
    number *out, const number *token_heads, const number *keys, const number *values, long row,
    long end, const int64_t *own_rows, const int64_t *places, long tokens, long capacity,
    long key_heads, float scale, long threads)
{
    long size = (GROUP + 2) * key_heads * HEAD_DIM, width = key_heads * HEAD_DIM;
    long blocks = (tokens + TOKENS - 1) / TOKENS;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (long part = 0; part < blocks * key_heads; part++) {
        /* The last tokens attend to most, so they are computed first. */
        long first = (blocks - 1 - part / key_heads) * TOKENS, head = part % key_heads;
        long count = tokens - first < TOKENS ? tokens - first : TOKENS;
        struct rows cache = {keys + head * HEAD_DIM, values + head * HEAD_DIM, width, capacity};
        attend_block(
            out + first * GROUP * width + head * GROUP * HEAD_DIM, GROUP * width,
            token_heads + first * size + head * GROUP * HEAD_DIM, size, cache, row,
            own_rows ? end : end - tokens + first + count, count,
            own_rows ? own_rows + first : 0, own_rows ? places + first : 0, scale);
    }
}
