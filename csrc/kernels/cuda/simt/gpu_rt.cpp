// The GPU's runtime (core/gpu_rt.h) as the executor has it. Work that is queued on a stream runs
// when somebody waits for it, as late as possible, so that memory which is changed or freed too
// early shows. A capture refuses what CUDA refuses.
#include "core/gpu_rt.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <vector>

#include "kernels/cuda/simt/executor.h"
#include "kernels/cuda/simt/memory.h"

namespace qn::simt {
namespace {

enum Error { kNone, kLaunchFailed, kOutOfMemory, kBadPointer, kCapturing, kNotCapturing };
constexpr const char* kErrors[] = {
    "no error",
    "a kernel was given up, see the executor's reports",
    "out of memory",
    "not device or page-locked memory",
    "not possible while a graph is captured",
    "no graph is captured",
};

using Work = std::function<int()>;

struct Graph {
  std::vector<Work> work;
};

struct Stream {
  std::vector<Work> queue;
  size_t done = 0;  // of all that has ever been queued
  size_t queued = 0;
  std::unique_ptr<Graph> capture;

  void add(Work work) {
    if (capture != nullptr) {
      capture->work.push_back(std::move(work));
      return;
    }
    queue.push_back(std::move(work));
    ++queued;
  }

  int run_until(size_t end) {
    const size_t count = end <= done ? 0 : end - done;
    int error = kNone;
    for (size_t i = 0; i < count && error == kNone; ++i) error = queue[i]();
    queue.erase(queue.begin(), queue.begin() + static_cast<std::ptrdiff_t>(count));
    done += count;
    return error;
  }
};

struct Event {
  Stream* stream = nullptr;
  size_t end = 0;
};

std::map<uintptr_t, size_t> pinned;  // start to size
std::map<void*, size_t> allocated;   // device memory
size_t allocated_bytes = 0;
bool capturing = false;

/// QN_SIM_MEMORY: bytes of the simulated device's memory; default 1 GiB.
size_t total_bytes() {
  const char* value = std::getenv("QN_SIM_MEMORY");
  return value == nullptr ? size_t{1} << 30 : std::strtoull(value, nullptr, 10);
}

bool is_pinned(const void* pointer, size_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  auto found = pinned.upper_bound(address);
  if (found == pinned.begin()) return false;
  --found;
  return address - found->first + bytes <= found->second;
}

int copy_now(void* to, const void* from, size_t bytes) {
  const bool from_known = is_pinned(from, bytes) || in_buffer(from, bytes);
  if (!from_known || !(is_pinned(to, bytes) || mark_initialised(to, bytes))) return kBadPointer;
  memcpy(to, from, bytes);
  return kNone;
}

/// A launch with its own copies of the arguments.
struct KeptLaunch {
  explicit KeptLaunch(const Launch& launch_) : launch(launch_) {
    closure.assign(static_cast<const char*>(launch.closure), launch.closure_bytes);
    for (int i = 0; i < launch.num_arguments; ++i) {
      const Argument& argument = launch.arguments[i];
      contents.emplace_back(static_cast<const char*>(argument.data), argument.bytes);
    }
    for (const std::string& content : contents)
      arguments.push_back({content.data(), content.size()});
    launch.closure = closure.data();
    launch.arguments = arguments.data();
  }
  KeptLaunch(const KeptLaunch&) = delete;
  KeptLaunch& operator=(const KeptLaunch&) = delete;

  Launch launch;
  std::string closure;
  std::vector<std::string> contents;
  std::vector<Argument> arguments;
};

Stream* stream_of(void* stream) { return static_cast<Stream*>(stream); }

}  // namespace

int submit(const Launch& launch, void* stream) {
  if (stream == nullptr) return capturing ? kCapturing : run(launch);
  const auto kept = std::make_shared<KeptLaunch>(launch);
  stream_of(stream)->add([kept] { return run(kept->launch); });
  return kNone;
}

}  // namespace qn::simt

using namespace qn::simt;

extern "C" {

int qn_gpu_device_count() { return 1; }

int qn_gpu_info(qn::GpuInfo* info) {
  *info = {};
  std::snprintf(info->name, sizeof info->name, "SIMT executor");
  info->major = 8;
  info->multiprocessors = 4;
  info->total_bytes = total_bytes();
  info->free_bytes = info->total_bytes > allocated_bytes ? info->total_bytes - allocated_bytes : 0;
  return kNone;
}

const char* qn_gpu_error(int error) { return kErrors[error]; }

int qn_gpu_alloc(void** pointer, size_t bytes, void*) {
  if (capturing) return kCapturing;
  if (bytes > total_bytes() || allocated_bytes > total_bytes() - bytes) return kOutOfMemory;
  try {
    *pointer = allocate(bytes);
  } catch (const std::bad_alloc&) {
    return kOutOfMemory;
  }
  allocated[*pointer] = bytes;
  allocated_bytes += bytes;
  return kNone;
}

int qn_gpu_free(void* pointer, void* stream) {
  if (capturing) return kCapturing;
  const auto found = allocated.find(pointer);
  if (found == allocated.end()) return kBadPointer;
  allocated_bytes -= found->second;
  allocated.erase(found);
  stream_of(stream)->add([pointer] { return release(pointer) ? kNone : kBadPointer; });
  return kNone;
}

int qn_gpu_alloc_host(void** pointer, size_t bytes) {
  if (capturing) return kCapturing;
  *pointer = std::malloc(bytes);
  if (*pointer == nullptr) return kOutOfMemory;
  pinned[reinterpret_cast<uintptr_t>(*pointer)] = bytes;
  return kNone;
}

int qn_gpu_free_host(void* pointer) {
  if (pinned.erase(reinterpret_cast<uintptr_t>(pointer)) == 0) return kBadPointer;
  std::free(pointer);
  return kNone;
}

int qn_gpu_copy(void* to, const void* from, size_t bytes, void* stream) {
  stream_of(stream)->add([=] { return copy_now(to, from, bytes); });
  return kNone;
}

int qn_gpu_stream_create(void** stream) {
  *stream = new Stream;
  return kNone;
}

int qn_gpu_stream_destroy(void* stream) {
  const int error = stream_of(stream)->run_until(stream_of(stream)->queued);
  delete stream_of(stream);
  return error;
}

int qn_gpu_stream_sync(void* stream) {
  return capturing ? kCapturing : stream_of(stream)->run_until(stream_of(stream)->queued);
}

int qn_gpu_event_create(void** event) {
  *event = new Event;
  return kNone;
}

int qn_gpu_event_destroy(void* event) {
  delete static_cast<Event*>(event);
  return kNone;
}

int qn_gpu_event_record(void* event, void* stream) {
  if (capturing) return kCapturing;
  *static_cast<Event*>(event) = {stream_of(stream), stream_of(stream)->queued};
  return kNone;
}

int qn_gpu_event_sync(void* event) {
  if (capturing) return kCapturing;
  const Event& recorded = *static_cast<Event*>(event);
  return recorded.stream == nullptr ? kNone : recorded.stream->run_until(recorded.end);
}

int qn_gpu_capture_begin(void* stream) {
  if (capturing) return kCapturing;
  capturing = true;
  stream_of(stream)->capture = std::make_unique<Graph>();
  return kNone;
}

int qn_gpu_capture_end(void* stream, void** graph) {
  if (stream_of(stream)->capture == nullptr) return kNotCapturing;
  capturing = false;
  *graph = stream_of(stream)->capture.release();
  return kNone;
}

int qn_gpu_graph_launch(void* graph, void* stream) {
  if (capturing) return kCapturing;
  for (const Work& work : static_cast<Graph*>(graph)->work) stream_of(stream)->add(work);
  return kNone;
}

int qn_gpu_graph_destroy(void* graph) {
  delete static_cast<Graph*>(graph);
  return kNone;
}

}  // extern "C"
