/* Types and conversions that the sources share. A vector is as wide as the processor's registers. It is loaded and
   stored by memcpy, which compiles to one instruction and requires no alignment. */

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#define LANES (VECTOR_BYTES / 4)

typedef float floats __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t ints __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t words __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t halves __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef double doubles __attribute__((vector_size(VECTOR_BYTES)));

static inline float bits_to_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t float_to_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
static inline words select_words(ints mask, words a, words b) { return ((words)mask & a) | (~(words)mask & b); }

static inline floats load_float32(const float *p) { floats v; memcpy(&v, p, sizeof v); return v; }
static inline void store_float32(float *p, floats v) { memcpy(p, &v, sizeof v); }
static inline doubles load_float64(const double *p) { doubles v; memcpy(&v, p, sizeof v); return v; }
static inline void store_float64(double *p, doubles v) { memcpy(p, &v, sizeof v); }
static inline float get_float32(const float *p) { return *p; }
static inline void put_float32(float *p, float x) { *p = x; }
static inline double get_float64(const double *p) { return *p; }
static inline void put_float64(double *p, double x) { *p = x; }

/* bfloat16: the upper half of a float32, rounded to the nearest, ties to even; NaN stays NaN. */
static inline words load_halves(const uint16_t *p) {
    halves h;
    memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, words);
}
static inline void store_halves(uint16_t *p, words v) {
    halves h = __builtin_convertvector(v, halves);
    memcpy(p, &h, sizeof h);
}
static inline floats load_bfloat16(const uint16_t *p) { return (floats)(load_halves(p) << 16); }
static inline void store_bfloat16(uint16_t *p, floats v) {
    words bits = (words)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    store_halves(p, select_words(v == v, rounded, (bits >> 16) | 0x40));
}
static inline float get_bfloat16(const uint16_t *p) { return bits_to_float((uint32_t)*p << 16); }
static inline void put_bfloat16(uint16_t *p, float x) {
    uint32_t bits = float_to_bits(x);
    *p = x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : (bits >> 16) | 0x40;
}

/* float16: multiplying by 2^112 shifts the exponents, which handles subnormal numbers too. */
static inline floats load_float16(const uint16_t *p) {
    words bits = load_halves(p), magnitude = (bits & 0x7fff) << 13;
    words finite = (words)((floats)magnitude * 0x1p112f), special = magnitude | 0x7f800000;
    return (floats)(((bits & 0x8000) << 16) | select_words((ints)magnitude >= 0x0f800000, special, finite));
}
static inline words round_to_float16(words bits) {
    words sign = bits & 0x80000000, magnitude = bits ^ sign;
    words normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    words subnormal = (words)((floats)magnitude + 0.5f) - 0x3f000000;
    words infinite = select_words((ints)magnitude > 0x7f800000, magnitude * 0 + 0x7e00, magnitude * 0 + 0x7c00);
    words rounded = select_words((ints)magnitude < (113 << 23), subnormal, normal);
    return select_words((ints)magnitude >= (143 << 23), infinite, rounded) | (sign >> 16);
}
static inline void store_float16(uint16_t *p, floats v) { store_halves(p, round_to_float16((words)v)); }
static inline float get_float16(const uint16_t *p) {
    uint16_t lanes[LANES] = {*p};
    return load_float16(lanes)[0];
}
static inline void put_float16(uint16_t *p, float x) { *p = round_to_float16((words){float_to_bits(x)})[0]; }
