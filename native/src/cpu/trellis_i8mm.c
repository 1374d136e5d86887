/* trellis_i8mm.c: tiles of the trellis types by ARMv8.6's products of matrices of bytes (tiles_neon.h). */
#include "trellis_levels_neon.h"

#include "products_i8mm.h"

#define BY_BITS TQI_BY_TRELLIS_BITS
#include "tiles_neon.h"

const tqi_tiles tqi_trellis_tiles_i8mm = { load_queries, tile_scores, tile_accumulate };
