#include "schemas.h"

STABLE_TORCH_LIBRARY(prcl_fast_emulated, m) { prcl::define_schemas(m); }
