// Everything rows_kernels.h uses, to be included before an instruction set is chosen.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "rows_cpu.h"
