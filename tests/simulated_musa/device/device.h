// A simulated Moore Threads GPU: PyTorch's PrivateUse1 device over host memory.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>

#include <functional>
#include <memory>
#include <vector>

namespace simulated_musa {

constexpr auto kMusa = c10::DeviceType::PrivateUse1;

// device.cpp ------------------------------------------------------------------------------------

c10::DeviceIndex device_count();
c10::DeviceIndex current_device();
void set_current_device(c10::DeviceIndex index);
int64_t current_stream(c10::DeviceIndex index);
void set_current_stream(c10::DeviceIndex index, int64_t stream);

// Bytes that the tensors of a device hold now, and the most that they ever held.
int64_t allocated_bytes(c10::DeviceIndex index);
int64_t most_allocated_bytes(c10::DeviceIndex index);

c10::Allocator* device_allocator();
bool is_pinned(const void* data);

// Memory of `storage`, a host tensor's, as memory of a device.
c10::DataPtr as_device_memory(const c10::Storage& storage, c10::DeviceIndex index);

// The host's generator behind a device's.
at::Generator host_generator(const at::Generator& generator);
at::Generator default_host_generator(c10::DeviceIndex index);

// graph.cpp -------------------------------------------------------------------------------------

// What a capture recorded, in order; a replay does it again.
class Graph {
 public:
  void begin_capture();
  void end_capture();
  void replay() const;
  void reset();
  size_t size() const { return steps_.size(); }

 private:
  friend void record(std::function<void()> step);
  std::vector<std::function<void()>> steps_;
  bool captured_ = false;
};

// Whether this thread captures, and what to do then.
bool capturing();
void record(std::function<void()> step);
// Raise if this thread captures: `action` would make the host wait for the device.
void refuse_in_capture(const std::string& action);

// operators.cpp ---------------------------------------------------------------------------------

// A host tensor over the memory of `tensor`; other tensors as they are.
at::Tensor alias_on_host(const at::Tensor& tensor);
// Whether an operator with tensors of host and device raises.
void set_strict(bool strict);

}  // namespace simulated_musa
