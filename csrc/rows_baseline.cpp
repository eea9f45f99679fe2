// The row kernels for every processor the compiler's default target covers.
#include "rows_kernels_includes.h"

#define MOEBERT_ISA baseline
#define MOEBERT_VECTOR_BYTES 16
#include "rows_kernels.h"
