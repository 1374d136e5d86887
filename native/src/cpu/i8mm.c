/* i8mm.c: tiles of the PQO types by ARMv8.6's products of matrices of bytes (tiles_neon.h). */
#include "pqo_levels_neon.h"

#include "products_i8mm.h"

#define BY_BITS TQI_BY_BITS
#include "tiles_neon.h"

const tqi_tiles tqi_pqo_tiles_i8mm = { load_queries, tile_scores, tile_accumulate };
