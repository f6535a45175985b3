// Memory, streams, events, random numbers and the hooks by which PyTorch asks for them.
#include "device.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/GeneratorForPrivateuseone.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace simulated_musa {
namespace {

constexpr int kMostDevices = 8;
thread_local c10::DeviceIndex this_device = 0;
thread_local int64_t streams[kMostDevices] = {};
std::atomic<int64_t> last_stream{0};
std::atomic<int64_t> held[kMostDevices] = {};
std::atomic<int64_t> most_held[kMostDevices] = {};

struct Block {
  void* data;
  size_t size;
  c10::DeviceIndex device;
};

void* host_memory(size_t size) {
  constexpr size_t kAlignment = 256;
  void* data = std::aligned_alloc(kAlignment, (size + kAlignment - 1) / kAlignment * kAlignment);
  TORCH_CHECK(data != nullptr, "out of host memory: ", size, " bytes");
  return data;
}

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  held[block->device] -= static_cast<int64_t>(block->size);
  std::free(block->data);
  delete block;
}

// Fresh memory holds NaN in every floating-point format, so that what nobody wrote shows.
struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    auto device = c10::Device(kMusa, this_device);
    if (size == 0) return {nullptr, device};
    void* data = host_memory(size);
    std::memset(data, 0xFF, size);
    auto total = held[this_device] += static_cast<int64_t>(size);
    auto most = most_held[this_device].load();
    while (total > most && !most_held[this_device].compare_exchange_weak(most, total)) {
    }
    return {data, new Block{data, size, this_device}, &free_block, device};
  }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }
};

std::mutex pinned_mutex;
std::map<uintptr_t, size_t> pinned;  // Begin and size of every pinned block.

void free_pinned(void* data) {
  {
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned.erase(reinterpret_cast<uintptr_t>(data));
  }
  std::free(data);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    if (size == 0) return {nullptr, c10::Device(c10::DeviceType::CPU)};
    void* data = host_memory(size);
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned[reinterpret_cast<uintptr_t>(data)] = size;
    return {data, data, &free_pinned, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }
};

DeviceAllocator allocator;
PinnedAllocator pinned_allocator;

// --- random numbers ---------------------------------------------------------------------------

struct Generator final : c10::GeneratorImpl {
  explicit Generator(c10::DeviceIndex index,
                     at::Generator on_host = at::detail::createCPUGenerator())
      : c10::GeneratorImpl(c10::Device(kMusa, index),
                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        host(std::move(on_host)) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { host.set_offset(offset); }
  uint64_t get_offset() const override { return host.get_offset(); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_state(const c10::TensorImpl& state) override {
    host.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return host.unsafeGetGeneratorImpl()->get_state();
  }
  static c10::DeviceType device_type() { return kMusa; }

  at::Generator host;

 private:
  Generator* clone_impl() const override { return new Generator(device_.index(), host.clone()); }
};

const at::Generator& default_generator(c10::DeviceIndex index) {
  static std::vector<at::Generator> all = [] {
    std::vector<at::Generator> made;
    for (int number = 0; number < kMostDevices; ++number)
      made.push_back(at::make_generator<Generator>(number));
    return made;
  }();
  return all.at(index < 0 ? this_device : index);
}

// --- streams, events --------------------------------------------------------------------------

struct Event {
  std::chrono::steady_clock::time_point time;
};

struct DeviceGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kMusa; }
  c10::Device getDevice() const override { return {kMusa, this_device}; }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = getDevice();
    setDevice(device);
    return before;
  }
  void setDevice(c10::Device device) const override { set_current_device(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    this_device = device.index();
  }
  c10::DeviceIndex deviceCount() const noexcept override { return device_count(); }

  c10::Stream getStream(c10::Device device) const override {
    return stream(device, streams[index(device)]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream(device, 0); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return stream(device, ++last_stream);
  }
  c10::Stream exchangeStream(c10::Stream next) const override {
    auto before = getStream(next.device());
    streams[next.device_index()] = next.id();
    return before;
  }
  void* getStreamNativeHandle(const c10::Stream stream) const override {
    return reinterpret_cast<void*>(stream.id());
  }
  // Work is done by the time its call returns, so a stream is idle whenever one can ask.
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {
    refuse_in_capture("synchronizing a stream");
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    refuse_in_capture("synchronizing a device");
  }
  bool isStreamCapturing(const c10::Stream&) const override { return capturing(); }

  void record(void** event, const c10::Stream&, const c10::DeviceIndex,
              const c10::EventFlag) const override {
    if (*event == nullptr) *event = new Event;
    static_cast<Event*>(*event)->time = std::chrono::steady_clock::now();
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override { refuse_in_capture("synchronizing an event"); }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }
  double elapsedTime(void* from, void* to, const c10::DeviceIndex) const override {
    auto elapsed = static_cast<Event*>(to)->time - static_cast<Event*>(from)->time;
    return std::chrono::duration<double, std::milli>(elapsed).count();
  }

 private:
  static c10::DeviceIndex index(c10::Device device) {
    return device.has_index() ? device.index() : this_device;
  }
  static c10::Stream stream(c10::Device device, int64_t id) {
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(kMusa, index(device)), id);
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, DeviceGuard);

// --- hooks ------------------------------------------------------------------------------------

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return device_count() > 0; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  void init() const override {}
  c10::DeviceIndex deviceCount() const override { return device_count(); }
  void setCurrentDevice(c10::DeviceIndex index) const override { set_current_device(index); }
  c10::DeviceIndex getCurrentDevice() const override { return this_device; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    auto before = this_device;
    set_current_device(index);
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override {
    return exchangeDevice(index);
  }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  c10::Device getDeviceFromPtr(void*) const override { return {kMusa, this_device}; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override {
    return default_generator(index);
  }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    return at::make_generator<Generator>(index < 0 ? this_device : index);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    auto memory = allocator.allocate(size);
    std::memcpy(memory.get(), storage.data(), std::min(size, storage.nbytes()));
    auto* impl = storage.unsafeGetStorageImpl();
    impl->set_data_ptr_noswap(std::move(memory));
    impl->set_nbytes(size);
  }
};

Hooks hooks;
const bool registered = [] {
  at::RegisterPrivateUse1HooksInterface(&hooks);
  c10::SetAllocator(kMusa, &allocator);
  return true;
}();

}  // namespace

c10::DeviceIndex device_count() {
  static const c10::DeviceIndex count = [] {
    const char* set = std::getenv("SIMULATED_MUSA_DEVICES");
    return static_cast<c10::DeviceIndex>(
        std::min(set == nullptr ? 2 : std::atoi(set), kMostDevices));
  }();
  return count;
}

c10::DeviceIndex current_device() { return this_device; }

void set_current_device(c10::DeviceIndex index) {
  TORCH_CHECK(0 <= index && index < device_count(), "MUSA error: invalid device ordinal ",
              int(index));
  this_device = index;
}

int64_t current_stream(c10::DeviceIndex index) { return streams[index < 0 ? this_device : index]; }
void set_current_stream(c10::DeviceIndex index, int64_t stream) {
  streams[index < 0 ? this_device : index] = stream;
}
int64_t allocated_bytes(c10::DeviceIndex index) { return held[index < 0 ? this_device : index]; }
int64_t most_allocated_bytes(c10::DeviceIndex index) {
  return most_held[index < 0 ? this_device : index];
}
c10::Allocator* device_allocator() { return &allocator; }

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> lock(pinned_mutex);
  auto address = reinterpret_cast<uintptr_t>(data);
  auto after = pinned.upper_bound(address);
  if (after == pinned.begin()) return false;
  auto block = std::prev(after);
  return address < block->first + block->second;
}

c10::DataPtr as_device_memory(const c10::Storage& storage, c10::DeviceIndex index) {
  auto* kept = new c10::Storage(storage);
  auto release = [](void* context) { delete static_cast<c10::Storage*>(context); };
  return {storage.mutable_data(), kept, release, c10::Device(kMusa, index)};
}

at::Generator host_generator(const at::Generator& generator) {
  if (generator.device().type() != kMusa) return generator;
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->host;
}

at::Generator default_host_generator(c10::DeviceIndex index) {
  return host_generator(default_generator(index));
}

}  // namespace simulated_musa
