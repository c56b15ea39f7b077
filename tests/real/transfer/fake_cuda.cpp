// A CUDA driver whose "GPU memory" is memfds that the test has made: exporting one gives its process and descriptor, opening one maps it
// read-only. Like the real one it wants a context pushed, opens a handle twice at one address, and counts.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <iterator>
#include <map>
#include <mutex>
#include <string>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define API extern "C" __attribute__((visibility("default")))

struct Handle { unsigned char bytes[64]; };
struct Allocation { uint64_t bytes; int fd; uint64_t number; };
struct Opened { uint64_t bytes; int count; std::string handle; };

static std::mutex lock;
static std::map<uint64_t, Allocation> allocations;
static std::map<uint64_t, Opened> opened;
static int refusal = 0;
static thread_local int pushed = 0;
enum { OK = 0, INVALID_VALUE = 1, INVALID_CONTEXT = 201, MAP_FAILED_ = 205, INVALID_HANDLE = 400 };

API void fake_allocation(uint64_t base, uint64_t bytes, int fd) {
    std::lock_guard<std::mutex> held(lock);
    static uint64_t number = 0;
    for (auto one = allocations.begin(); one != allocations.end();)  // what lay there has been freed
        one = one->first < base + bytes && base < one->first + one->second.bytes ? allocations.erase(one) : std::next(one);
    allocations[base] = {bytes, fd, ++number};
}
API void fake_refusal(int code) { refusal = code; }
API int fake_opened() {
    std::lock_guard<std::mutex> held(lock);
    return (int)opened.size();
}

API int cuInit(unsigned) { return OK; }
API int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal ? INVALID_VALUE : OK; }
API int cuDeviceGetPCIBusId(char *text, int bytes, int) { snprintf(text, bytes, "0000:1B:00.0"); return OK; }
API int cuDevicePrimaryCtxRetain(void **context, int) { *context = &allocations; return OK; }
API int cuCtxPushCurrent_v2(void *context) { pushed++; return context == &allocations ? OK : INVALID_CONTEXT; }
API int cuCtxPopCurrent_v2(void **context) { *context = &allocations; return pushed-- > 0 ? OK : INVALID_CONTEXT; }
API int cuGetErrorName(int code, const char **text) {
    *text = code == INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE" : code == INVALID_HANDLE ? "CUDA_ERROR_INVALID_HANDLE" : nullptr;
    return *text ? OK : INVALID_VALUE;
}

API int cuMemGetAddressRange_v2(uint64_t *base, size_t *bytes, uint64_t address) {
    if (!pushed) return INVALID_CONTEXT;
    std::lock_guard<std::mutex> held(lock);
    auto found = opened.find(address);
    if (found != opened.end()) { *base = address; *bytes = found->second.bytes; return OK; }
    for (auto &[at, one] : allocations)
        if (at <= address && address < at + one.bytes) { *base = at; *bytes = one.bytes; return OK; }
    return INVALID_VALUE;
}

API int cuIpcGetMemHandle(Handle *handle, uint64_t base) {
    if (!pushed) return INVALID_CONTEXT;
    std::lock_guard<std::mutex> held(lock);
    auto found = allocations.find(base);
    if (found == allocations.end()) return INVALID_VALUE;
    memset(handle, 0, sizeof *handle);
    memcpy(handle->bytes, "FAKE", 4);
    memcpy(handle->bytes + 8, &found->second.number, 8);
    int32_t who[2] = {getpid(), found->second.fd};
    memcpy(handle->bytes + 56, who, sizeof who);
    return OK;
}

API int cuIpcOpenMemHandle_v2(uint64_t *address, Handle handle, unsigned flags) {
    if (!pushed) return INVALID_CONTEXT;
    if (refusal) return refusal;
    if (flags != 1) return INVALID_VALUE;
    if (memcmp(handle.bytes, "FAKE", 4)) return INVALID_HANDLE;
    std::lock_guard<std::mutex> held(lock);
    std::string name((char *)handle.bytes, sizeof handle.bytes);
    for (auto &[at, one] : opened)
        if (one.handle == name) { one.count++; *address = at; return OK; }
    int32_t who[2];
    memcpy(who, handle.bytes + 56, sizeof who);
    int fd = open(("/proc/" + std::to_string(who[0]) + "/fd/" + std::to_string(who[1])).c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) return INVALID_HANDLE;
    struct stat found;
    void *mapped = fstat(fd, &found) ? MAP_FAILED : mmap(nullptr, found.st_size, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    if (mapped == MAP_FAILED) return MAP_FAILED_;
    *address = (uint64_t)mapped;
    opened[*address] = {(uint64_t)found.st_size, 1, name};
    return OK;
}

API int cuIpcCloseMemHandle(uint64_t address) {
    if (!pushed) return INVALID_CONTEXT;
    std::lock_guard<std::mutex> held(lock);
    auto found = opened.find(address);
    if (found == opened.end()) return INVALID_VALUE;
    if (--found->second.count) return OK;
    munmap((void *)address, found->second.bytes);
    opened.erase(found);
    return OK;
}
