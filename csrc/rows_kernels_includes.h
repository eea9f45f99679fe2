// Everything rows_kernels.h uses, to be included before an instruction set is chosen.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "parallel.h"
#include "rows_cpu.h"
