/* trellis_dotprod.c: the trellis types by ARMv8.2's dot products of bytes (lanes_neon.h). */
#include "trellis_levels_neon.h"

#include "products_dotprod.h"

#include "lanes_neon.h"

#define BY_BITS TQI_BY_TRELLIS_BITS
#define ATTENTION_ONLY
#include "steps.h"
#include "tiles_neon.h"

static const tqi_tiles tiles = { load_queries, tile_scores, tile_accumulate };

const tqi_steps tqi_trellis_dotprod = {
    tqi_trellis_encode_neon, tqi_trellis_unpack_neon, load_query, scores, accumulate, &tiles
};

/* A query vector at a time gives smmla little to save; tiles do. */
const tqi_steps tqi_trellis_i8mm = { tqi_trellis_encode_neon, tqi_trellis_unpack_neon, load_query, scores, accumulate,
                                     &tqi_trellis_tiles_i8mm };
