/* The part of NVIDIA's driver that cuda_driver.py calls, of a card with 132 SMs that grants multiples of 8, as a
 * library built from NVIDIA's own header: what arrives here has passed through the real bindings. */
#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ALL 132

static int contexts;

struct CUgreenCtx_st {
    unsigned sms;
};

struct CUdevResourceDesc_st {
    unsigned sms;
};

struct CUstream_st {
    unsigned sms;
};

static CUdevResource sms(unsigned count) {
    CUdevResource resource;
    memset(&resource, 0, sizeof resource);
    resource.type = CU_DEV_RESOURCE_TYPE_SM;
    resource.sm.smCount = count;
#if CUDA_VERSION >= 13000
    resource.sm.minSmPartitionSize = 8;
    resource.sm.smCoscheduledAlignment = 8;
#endif
    return resource;
}

CUresult cuInit(unsigned flags) {
    return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
    *version = CUDA_VERSION;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    *device = ordinal;
    return ordinal ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}

CUresult cuDeviceGetDevResource(CUdevice device, CUdevResource *resource, CUdevResourceType type) {
    if (device || type != CU_DEV_RESOURCE_TYPE_SM)
        return CUDA_ERROR_INVALID_VALUE;
    *resource = sms(ALL);
    return CUDA_SUCCESS;
}

CUresult cuDevSmResourceSplitByCount(CUdevResource *result, unsigned *groups, const CUdevResource *input,
                                     CUdevResource *remaining, unsigned flags, unsigned least) {
    unsigned granted = (least + 7) / 8 * 8;
    if (input->type != CU_DEV_RESOURCE_TYPE_SM || input->sm.smCount != ALL || flags || *groups != 1)
        return CUDA_ERROR_INVALID_VALUE;
    if (granted > ALL)
        return CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION;
    *result = sms(granted);
    *remaining = sms(ALL - granted);
    return CUDA_SUCCESS;
}

CUresult cuDevResourceGenerateDesc(CUdevResourceDesc *description, CUdevResource *resources, unsigned count) {
    if (count != 1 || resources->type != CU_DEV_RESOURCE_TYPE_SM)
        return CUDA_ERROR_INVALID_VALUE;
    *description = malloc(sizeof **description);
    (*description)->sms = resources->sm.smCount;
    return CUDA_SUCCESS;
}

#ifndef OLD_DRIVER
CUresult cuGreenCtxCreate(CUgreenCtx *context, CUdevResourceDesc description, CUdevice device, unsigned flags) {
    if (device || flags != CU_GREEN_CTX_DEFAULT_STREAM)
        return CUDA_ERROR_INVALID_VALUE;
    *context = malloc(sizeof **context);
    (*context)->sms = description->sms;
    contexts++;
    return CUDA_SUCCESS;
}
#endif

CUresult cuGreenCtxStreamCreate(CUstream *stream, CUgreenCtx context, unsigned flags, int priority) {
    if (flags != CU_STREAM_NON_BLOCKING || priority > 0)
        return CUDA_ERROR_INVALID_VALUE;
    *stream = malloc(sizeof **stream);
    (*stream)->sms = context->sms;
    return CUDA_SUCCESS;
}

CUresult cuGreenCtxGetDevResource(CUgreenCtx context, CUdevResource *resource, CUdevResourceType type) {
    if (type != CU_DEV_RESOURCE_TYPE_SM)
        return CUDA_ERROR_INVALID_VALUE;
    *resource = sms(context->sms);
    return CUDA_SUCCESS;
}

CUresult cuStreamDestroy_v2(CUstream stream) {
    free(stream);
    return CUDA_SUCCESS;
}

CUresult cuGreenCtxDestroy(CUgreenCtx context) {
    free(context);
    contexts--;
    return CUDA_SUCCESS;
}

/* Not the driver's: contexts that were made and not destroyed, SMs of a stream. */
int stub_contexts(void) {
    return contexts;
}

unsigned stub_sms(CUstream stream) {
    return stream->sms;
}

CUresult cuGetProcAddress_v2(const char *symbol, void **function, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult *status) {
    char name[128];
    void *self = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    (void)version, (void)flags;
    snprintf(name, sizeof name, "%s_v2", symbol);
    *function = dlsym(self, name);
    if (!*function)
        *function = dlsym(self, symbol);
    if (status)
        *status = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
