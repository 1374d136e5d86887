/* trellis_dotprod.c: the trellis types by ARMv8.2's dot products of bytes (lanes_neon.h). */
#include "trellis_levels_neon.h"

#include "products_dotprod.h"

#include "lanes_neon.h"

#define BY_BITS TQI_BY_TRELLIS_BITS
#define ATTENTION_ONLY
#include "steps.h"
#include "tiles_neon.h"

const tqi_steps tqi_trellis_dotprod = {
    tqi_trellis_encode_neon, tqi_trellis_unpack_neon, load_query, scores, accumulate, &tiles
};
