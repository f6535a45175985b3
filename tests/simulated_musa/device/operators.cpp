// Operators: nearly all run as the host's, over the same memory.
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <set>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <unordered_map>

#include "device.h"

namespace simulated_musa {
namespace {

std::atomic<bool> strict{true};

bool is_musa(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == kMusa;
}

c10::DispatchKeySet device_keys() { return c10::DispatchKeySet(c10::DispatchKey::PrivateUse1); }

c10::Storage host_storage(const c10::Storage& storage) {
  auto* kept = new c10::Storage(storage);
  auto release = [](void* context) { delete static_cast<c10::Storage*>(context); };
  c10::DataPtr memory{storage.mutable_data(), kept, release, c10::Device(c10::DeviceType::CPU)};
  auto* allocator = c10::GetAllocator(c10::DeviceType::CPU);
  return c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(memory),
                      allocator, true);
}

at::Tensor tensor_over(const c10::Storage& storage, c10::DispatchKeySet keys,
                       const at::Tensor& like) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), keys, like.dtype());
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return tensor;
}

void take_shape(const at::Tensor& tensor, const at::Tensor& from) {
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(from.sizes(), from.strides(),
                                                      from.storage_offset());
}

// The host's stand-ins for the arguments of one call, and the way back for its results.
class Crossing {
 public:
  c10::IValue to_host(const c10::IValue& value);
  c10::IValue to_device(const c10::IValue& value);
  // Hand to the device's tensors what the operator changed about their stand-ins besides the
  // contents.
  void settle();
  // Whether host tensors took part that an operator on a GPU could not read.
  bool mixed() const { return device_tensors_ > 0 && host_tensors_ > 0; }
  bool over_known_memory(const at::Tensor& on_host) const {
    return by_host_.count(on_host.storage().unsafeGetStorageImpl()) > 0;
  }
  void expect_device(c10::DeviceIndex index) {
    if (index_ < 0) index_ = index;
  }
  c10::DeviceIndex index() const { return index_ < 0 ? current_device() : index_; }

 private:
  struct Pair {
    at::Tensor device;
    at::Tensor host;
    const void* memory;
  };

  at::Tensor tensor_to_host(const at::Tensor& tensor);
  at::Tensor tensor_to_device(const at::Tensor& tensor);

  std::vector<Pair> pairs_;
  std::unordered_map<c10::StorageImpl*, c10::Storage> by_device_;
  std::unordered_map<c10::StorageImpl*, at::Tensor>
      by_host_;  // A tensor of the device over the same memory.
  int device_tensors_ = 0;
  int host_tensors_ = 0;
  c10::DeviceIndex index_ = -1;
};

at::Tensor Crossing::tensor_to_host(const at::Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  if (!is_musa(tensor)) {
    host_tensors_ += tensor.dim() > 0;
    return tensor;
  }
  device_tensors_ += 1;
  if (tensor.dim() > 0 || index_ < 0) {
    TORCH_CHECK(index_ < 0 || !strict || tensor.device().index() == index_ || tensor.dim() == 0,
                "Expected all tensors to be on the same device, but found musa:", int(index_),
                " and ", tensor.device());
    index_ = tensor.device().index();
  }
  for (const auto& pair : pairs_) {
    if (pair.device.is_same(tensor)) return pair.host;
  }
  auto* storage = tensor.storage().unsafeGetStorageImpl();
  auto known = by_device_.find(storage);
  if (known == by_device_.end()) {
    known = by_device_.emplace(storage, host_storage(tensor.storage())).first;
    by_host_[known->second.unsafeGetStorageImpl()] = tensor;
  }
  auto host = tensor_over(known->second, c10::DispatchKeySet(c10::DispatchKey::CPU), tensor);
  pairs_.push_back({tensor, host, known->second.data()});
  return host;
}

at::Tensor Crossing::tensor_to_device(const at::Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  for (const auto& pair : pairs_) {
    if (pair.host.is_same(tensor)) return pair.device;
  }
  if (!tensor.device().is_cpu() || !tensor.has_storage()) return tensor;
  auto* storage = tensor.storage().unsafeGetStorageImpl();
  auto known = by_host_.find(storage);
  if (known != by_host_.end()) {
    const auto& base = known->second;
    auto view = at::detail::make_tensor<c10::TensorImpl>(
        c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(), tensor.dtype());
    take_shape(view, tensor);
    return view;
  }
  auto memory = as_device_memory(tensor.storage(), index());
  c10::Storage taken(c10::Storage::use_byte_size_t(), tensor.storage().nbytes(), std::move(memory),
                     device_allocator(), true);
  auto made = tensor_over(taken, device_keys(), tensor);
  by_host_[storage] = made;
  return made;
}

void Crossing::settle() {
  for (const auto& pair : pairs_) {
    const auto& on_host = pair.host.storage();
    if (on_host.data() != pair.memory) {
      auto* storage = pair.device.storage().unsafeGetStorageImpl();
      storage->set_data_ptr_noswap(as_device_memory(on_host, pair.device.device().index()));
      storage->set_nbytes(on_host.nbytes());
    }
    const auto& device = pair.device;
    if (device.sizes() != pair.host.sizes() || device.strides() != pair.host.strides() ||
        device.storage_offset() != pair.host.storage_offset()) {
      take_shape(device, pair.host);
    }
  }
}

c10::IValue Crossing::to_host(const c10::IValue& value) {
  if (value.isTensor()) return tensor_to_host(value.toTensor());
  if (value.isDevice() && value.toDevice().type() == kMusa) {
    auto device = value.toDevice();
    expect_device(device.has_index() ? device.index() : current_device());
    return c10::Device(c10::DeviceType::CPU);
  }
  if (value.isGenerator()) return host_generator(value.toGenerator());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const auto& tensor : value.toTensorVector()) list.push_back(tensor_to_host(tensor));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) {
      list.push_back(tensor.has_value() ? std::optional<at::Tensor>(tensor_to_host(*tensor))
                                        : std::nullopt);
    }
    return list;
  }
  if (value.isList() && value.toList().elementType()->kind() == c10::TypeKind::ListType) {
    auto list = c10::impl::GenericList(value.toList().elementType());
    for (const c10::IValue& each : value.toListRef()) list.push_back(to_host(each));
    return list;
  }
  return value;
}

c10::IValue Crossing::to_device(const c10::IValue& value) {
  if (value.isTensor()) return tensor_to_device(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const auto& tensor : value.toTensorVector()) list.push_back(tensor_to_device(tensor));
    return list;
  }
  if (value.isList() && value.toList().elementType()->kind() == c10::TypeKind::ListType) {
    auto list = c10::impl::GenericList(value.toList().elementType());
    for (const c10::IValue& each : value.toListRef()) list.push_back(to_device(each));
    return list;
  }
  return value;
}

// --- rules of a GPU -----------------------------------------------------------------------------

// Operators that take tensors of the host beside those of a device.
const std::set<std::string> kMixing = {
    "aten::index",         "aten::index_put",         "aten::index_put_", "aten::_index_put_impl_",
    "aten::_unsafe_index", "aten::_unsafe_index_put", "aten::set_",       "aten::is_set_to"};

// Operators whose result's size, or whose result itself, the host must wait for.
const std::set<std::string> kWaiting = {"aten::_local_scalar_dense",
                                        "aten::nonzero",
                                        "aten::masked_select",
                                        "aten::_unique2",
                                        "aten::unique_dim",
                                        "aten::unique_consecutive",
                                        "aten::unique_dim_consecutive",
                                        "aten::equal",
                                        "aten::bincount"};

bool has_boolean_index(const c10::IValue& indices) {
  if (!indices.isOptionalTensorList()) return false;
  for (const std::optional<at::Tensor>& index : indices.toOptionalTensorVector()) {
    if (index.has_value() && index->defined() && index->scalar_type() == at::kBool) return true;
  }
  return false;
}

void apply_rules(const std::string& name, const torch::jit::Stack& arguments,
                 const Crossing& crossing) {
  bool collective = name.rfind("c10d::", 0) == 0;
  TORCH_CHECK(!strict || !crossing.mixed() || collective || kMixing.count(name),
              "Expected all tensors to be on the same device, but ", name,
              " got tensors of musa and of cpu");
  if (!capturing()) return;
  if (kWaiting.count(name)) refuse_in_capture(name);
  bool mask = name == "aten::index" && arguments.size() > 1 && has_boolean_index(arguments[1]);
  if (mask) refuse_in_capture("an index of booleans");
}

void wait_for(const torch::jit::Stack& results) {
  for (const auto& result : results) {
    if (!result.isObject() || result.type()->repr_str().find("Work") == std::string::npos) continue;
    result.toCustomClass<c10d::Work>()->wait();
  }
}

void collect(const c10::IValue& value, std::vector<at::Tensor>& tensors) {
  if (value.isTensor()) {
    tensors.push_back(value.toTensor());
  } else if (value.isTensorList()) {
    for (const auto& tensor : value.toTensorVector()) tensors.push_back(tensor);
  }
}

std::vector<at::Tensor> tensors_of(const torch::jit::Stack& values) {
  std::vector<at::Tensor> tensors;
  for (const auto& value : values) collect(value, tensors);
  return tensors;
}

// Do it again at each replay, and put the results where the first ones are.
void record_call(const c10::OperatorHandle& op, torch::jit::Stack arguments,
                 const torch::jit::Stack& results, const Crossing& crossing) {
  std::vector<at::Tensor>
      kept;  // Undefined where a result is memory of an argument's, and so in place already.
  for (const auto& tensor : tensors_of(results)) {
    bool in_place = !tensor.defined() || crossing.over_known_memory(tensor);
    kept.push_back(in_place ? at::Tensor() : tensor);
  }
  record([op, arguments = std::move(arguments), kept = std::move(kept)] {
    at::AutoDispatchBelowADInplaceOrView below;
    torch::jit::Stack stack = arguments;
    op.callBoxed(&stack);
    wait_for(stack);
    auto again = tensors_of(stack);
    for (size_t number = 0; number < kept.size(); ++number) {
      if (!kept[number].defined()) continue;
      TORCH_CHECK(kept[number].sizes() == again[number].sizes(), op.operator_name().name,
                  " gave a tensor of another shape at a replay");
      kept[number].copy_(again[number]);
    }
  });
}

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  at::AutoDispatchBelowADInplaceOrView below;
  const auto& schema = op.schema();
  const auto count = schema.arguments().size();
  Crossing crossing;
  torch::jit::Stack arguments;
  arguments.reserve(count);
  const auto first = stack->size() - count;
  for (size_t number = 0; number < count; ++number)
    arguments.push_back(crossing.to_host((*stack)[first + number]));
  for (size_t number = 0; number < count; ++number) {
    bool unset = arguments[number].isNone() && schema.arguments()[number].name() == "generator";
    if (unset) arguments[number] = default_host_generator(crossing.index());
  }
  apply_rules(schema.name(), arguments, crossing);
  torch::jit::Stack results = arguments;
  op.callBoxed(&results);
  if (capturing()) {
    wait_for(results);
    record_call(op, std::move(arguments), results, crossing);
  }
  stack->resize(first);
  for (const auto& result : results) stack->push_back(crossing.to_device(result));
  crossing.settle();
}

// --- the device's own ----------------------------------------------------------------------------

c10::DeviceIndex index_of(std::optional<c10::Device> device) {
  return device.has_value() && device->has_index() ? device->index() : current_device();
}

// Memory of a graph's own holds anything at a replay, so it is made unusable again there.
at::Tensor poisoned_at_replay(at::Tensor tensor) {
  if (capturing() && tensor.storage().nbytes() > 0) {
    auto storage = tensor.storage();
    record([storage] { std::memset(storage.mutable_data(), 0xFF, storage.nbytes()); });
  }
  return tensor;
}

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(c10::Device(kMusa, index_of(device)));
  auto type = c10::dtype_or_default(dtype);
  return poisoned_at_replay(
      at::detail::empty_generic(size, device_allocator(), device_keys(), type, format));
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(c10::Device(kMusa, index_of(device)));
  auto type = c10::dtype_or_default(dtype);
  return poisoned_at_replay(
      at::detail::empty_strided_generic(size, stride, device_allocator(), device_keys(), type));
}

void require_pinned_in_capture(const at::Tensor& tensor) {
  bool pageable = !is_musa(tensor) && tensor.numel() > 0 && !is_pinned(tensor.storage().data());
  if (pageable) refuse_in_capture("a copy between the device and host memory that is not pinned");
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& dst, bool) {
  at::AutoDispatchBelowADInplaceOrView below;
  if (capturing()) {
    require_pinned_in_capture(self);
    require_pinned_in_capture(dst);
  }
  auto from = alias_on_host(self), to = alias_on_host(dst);
  to.copy_(from);
  record([from, to] {
    at::AutoDispatchBelowADInplaceOrView below;
    to.copy_(from);
  });
  return dst;
}

const at::Tensor& resize_(const at::Tensor& self, at::IntArrayRef size,
                          std::optional<at::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  auto needed = (self.storage_offset() + self.numel()) * self.element_size();
  if (needed > self.storage().nbytes()) {
    c10::DeviceGuard guard(self.device());
    auto memory = device_allocator()->allocate(needed);
    if (self.storage().nbytes() > 0)
      std::memcpy(memory.get(), self.storage().data(), self.storage().nbytes());
    auto* storage = self.storage().unsafeGetStorageImpl();
    storage->set_data_ptr_noswap(std::move(memory));
    storage->set_nbytes(needed);
  }
  return self;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& dst) {
  dst.resize_(self.sizes());
  return copy_from(self, dst, false);
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size,
                        at::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  if (stride.empty() && !size.empty()) {
    impl->set_storage_offset(offset);
    impl->set_sizes_contiguous(size);
  } else {
    impl->set_sizes_and_strides(size, stride, offset);
  }
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage source) {
  auto count = static_cast<int64_t>(source.nbytes() / self.element_size());
  return set_storage(self, std::move(source), 0, {count}, {1});
}

void record_stream(at::Tensor&, at::Stream) {}

}  // namespace

at::Tensor alias_on_host(const at::Tensor& tensor) {
  if (!is_musa(tensor)) return tensor;
  return tensor_over(host_storage(tensor.storage()), c10::DispatchKeySet(c10::DispatchKey::CPU),
                     tensor);
}

void set_strict(bool value) { strict = value; }

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", TORCH_FN(empty));
  library.impl("empty_strided", TORCH_FN(empty_strided));
  library.impl("_copy_from", TORCH_FN(copy_from));
  library.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
  library.impl("resize_", TORCH_FN(resize_));
  library.impl("set_.source_Storage", TORCH_FN(set_whole_storage));
  library.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  library.impl("record_stream", TORCH_FN(record_stream));
}

// PyTorch has kernels of its own for collectives on PrivateUse1, which ask for a process group of
// that device.
void route_collectives() {
  static torch::Library library(torch::Library::IMPL, "c10d", c10::DispatchKey::PrivateUse1,
                                __FILE__, __LINE__);
  static const char* names[] = {"send",
                                "recv_",
                                "recv_any_source_",
                                "reduce_",
                                "broadcast_",
                                "allreduce_",
                                "allreduce_coalesced_",
                                "allgather_",
                                "_allgather_base_",
                                "allgather_coalesced_",
                                "allgather_into_tensor_coalesced_",
                                "reduce_scatter_",
                                "_reduce_scatter_base_",
                                "reduce_scatter_tensor_coalesced_",
                                "gather_",
                                "scatter_",
                                "alltoall_",
                                "alltoall_base_",
                                "barrier"};
  for (const char* name : names) {
    auto known = c10::Dispatcher::singleton().findSchema({std::string("c10d::") + name, ""});
    if (known.has_value())
      library.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  }
}

}  // namespace simulated_musa
