/* Includes TEMPLATE once for each dtype of a table, with these macros:
   DTYPE                   float32, float64, bfloat16 or float16
   ROW                     type of an element in memory
   SUM, VECTOR             type in which sums are accumulated, and a register of them
   NAME(f) is f_DTYPE: NAME(load), NAME(store), NAME(get) and NAME(put) convert between the two. WIDTH is the number of
   lanes of a register. */
#define JOIN(f, dtype) f##_##dtype
#define JOIN_EXPANDED(f, dtype) JOIN(f, dtype)
#define NAME(f) JOIN_EXPANDED(f, DTYPE)
#define WIDTH (VECTOR_BYTES / (int)sizeof(SUM))

#define SUM float
#define VECTOR floats

#define DTYPE float32
#define ROW float
#include TEMPLATE
#undef DTYPE
#undef ROW

#define ROW uint16_t
#define DTYPE bfloat16
#include TEMPLATE
#undef DTYPE

#define DTYPE float16
#include TEMPLATE
#undef DTYPE
#undef ROW

#undef SUM
#undef VECTOR
#define SUM double
#define VECTOR doubles
#define DTYPE float64
#define ROW double
#include TEMPLATE
