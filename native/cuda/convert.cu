/* convert.cu: floats of one tensor to those of another: f32, f16, bf16, by strides. What attention needs of a q in
 * f16. */
#include "rows.cuh"

struct tqi_conversion {
    tq_cuda_view src, dst;
    int64_t n;
};

TQI_KERNEL(TQI_ROW_THREADS, 4) tqi_convert_kernel(TQI_PARAMETER tqi_conversion c) {
    const int64_t i = (int64_t) tqi_block_x() * TQI_ROW_THREADS + tqi_thread();
    if (i < c.n) {
        const float x = tqi_load_value(c.src.type, tqi_address(c.src, 1, tqi_place_of(c.src, i)));
        tqi_store_value(c.dst.type, x, tqi_address(c.dst, 1, tqi_place_of(c.dst, i)));
    }
}

static int check_floats(const char * name, const tq_cuda_view * x) {
    if (x == NULL || x->data == NULL ||
        (x->type != TQ_TYPE_F32 && x->type != TQ_TYPE_F16 && x->type != TQ_CUDA_TYPE_BF16)) {
        return tq_cuda_fail(TQ_E_ARGUMENT, "%s: type %d at %p given; it must be f32, f16 or bf16", name,
                            x == NULL ? -1 : x->type, x == NULL ? NULL : x->data);
    }
    const size_t unit = x->type == TQ_TYPE_F32 ? 4 : 2;
    if (((uintptr_t) x->data | x->nb[0] | x->nb[1] | x->nb[2] | x->nb[3]) % unit != 0) {
        return tq_cuda_fail(TQ_E_ARGUMENT, "%s: data at %p, strides %zu, %zu, %zu, %zu; all must be multiples of %zu",
                            name, x->data, x->nb[0], x->nb[1], x->nb[2], x->nb[3], unit);
    }
    return TQ_OK;
}

extern "C" int tq_cuda_convert(const tq_cuda_view * src, const tq_cuda_view * dst, void * stream) {
    if (check_floats("source", src) != TQ_OK || check_floats("target", dst) != TQ_OK) {
        return TQ_E_ARGUMENT;
    }
    tqi_conversion c = { *src, *dst, 1 };
    for (int i = 0; i < 4; ++i) {
        if (src->ne[i] != dst->ne[i] || src->ne[i] < 0 || src->ne[i] > INT32_MAX) {
            return tq_cuda_fail(TQ_E_ARGUMENT, "ne[%d] is %lld and %lld; shapes must be equal, and counts up to %d", i,
                                (long long) src->ne[i], (long long) dst->ne[i], INT32_MAX);
        }
        c.n = src->ne[i] > 0 && c.n > INT64_MAX / src->ne[i] ? INT64_MAX : c.n * src->ne[i];
    }
    return tqi_launch_each(tqi_convert_kernel, "convert", c.n, TQI_ROW_THREADS, TQI_ROW_THREADS, stream, c);
}
