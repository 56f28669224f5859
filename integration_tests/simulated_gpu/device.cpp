// Torch's device `cuda`, on a machine without one: it computes on the host.
//
// A build of torch for the CPU knows the device, but has no kernels for it.
// Here it gets one for all operators: it takes the tensors of the device for
// tensors of the host that share their memory, and runs the host's kernel. What
// a GPU would refuse is refused: tensors or a random generator of another
// device in one operator. What a GPU would wait for can be counted.
//
// For one build of torch, 2.13 for the CPU: much of this is not torch's public
// interface. The idea is that of torch's own example of a device from outside
// of its tree, `torch_openreg`.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <cstring>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace {

using c10::Device;
using c10::DeviceType;
using c10::IValue;
using c10::Stream;

const Device kHost(DeviceType::CPU);
const Device kGpu(DeviceType::CUDA, 0);

// Asked about an operator with tensors of two devices: may it go on?
py::object* may_mix = nullptr;
// 0, 1 or 2: operators that wait for the GPU pass, warn or raise.
int sync_debug_mode = 0;

void waits(const std::string& what) {
  const auto said = "called a synchronizing CUDA operation: " + what;
  if (sync_debug_mode == 1) TORCH_WARN(said);
  TORCH_CHECK(sync_debug_mode < 2, said);
}

// One device with one stream, on which nothing is ever left to wait for.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr DeviceType static_type = DeviceType::CUDA;
  const Stream stream{Stream::DEFAULT, kGpu};
  DeviceType type() const override { return static_type; }
  Device exchangeDevice(Device) const override { return kGpu; }
  Device getDevice() const override { return kGpu; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  Stream getStream(Device) const override { return stream; }
  Stream getNewStream(Device, int) const override { return stream; }
  Stream exchangeStream(Stream) const override { return stream; }
  void record(void**, const Stream&, const c10::DeviceIndex,
              const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

// A generator of the device: one of the host under another name.
struct Generator final : c10::GeneratorImpl {
  explicit Generator(at::Generator host)
      : GeneratorImpl(kGpu, c10::DispatchKeySet(c10::DispatchKey::CUDA)),
        host(std::move(host)) {}
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
  Generator* clone_impl() const override { return new Generator(host.clone()); }
  at::Generator host;
};

at::Generator new_generator() {
  return at::make_generator<Generator>(at::detail::createCPUGenerator());
}

const at::Generator& default_generator() {
  static const at::Generator generator = new_generator();
  return generator;
}

at::Generator host_of(const at::Generator& generator) {
  TORCH_CHECK(generator.device() == kGpu,
              "Expected a 'cuda' device type for generator but found '",
              generator.device(), "'");
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->host;
}

// What torch asks a build with CUDA.
struct Hooks final : at::CUDAHooksInterface {
  bool hasCUDA() const override { return true; }
  bool isAvailable() const override { return true; }
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return default_generator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return new_generator();
  }
};

void install_hooks() {
  // Torch looks for them once, while it is imported. The object that it has
  // found, which has no state, gets the functions of this one.
  static Hooks hooks;
  std::memcpy((void*)&at::detail::getCUDAHooks(), (void*)&hooks, sizeof(void*));
}

// A storage on `device` that has the memory of another one, and keeps it.
c10::Storage renamed(const c10::Storage& storage, Device device) {
  return c10::Storage(
      c10::Storage::use_byte_size_t(), storage.nbytes(),
      at::DataPtr(
          storage.mutable_data(), new c10::Storage(storage),
          [](void* kept) { delete static_cast<c10::Storage*>(kept); }, device),
      c10::GetAllocator(DeviceType::CPU), /*resizable=*/true);
}

void copy_metadata(const at::Tensor& from, const at::Tensor& to) {
  auto* impl = to.unsafeGetTensorImpl();
  impl->set_storage_offset(from.storage_offset());
  impl->set_sizes_and_strides(from.sizes(), from.strides());
}

at::Tensor tensor_over(const c10::Storage& storage, const at::Tensor& like) {
  const auto key = storage.device_type() == DeviceType::CPU
      ? c10::DispatchKey::CPU
      : c10::DispatchKey::CUDA;
  auto result = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(storage), c10::DispatchKeySet(key), like.dtype());
  copy_metadata(like, result);
  if (like.is_conj()) result._set_conj(true);
  if (like.is_neg()) result._set_neg(true);
  return result;
}

// The value with a function applied to the tensors in it.
template <typename F>
IValue mapped(const IValue& value, const F& f) {
  if (value.isTensor()) return f(value.toTensor());
  if (!value.isList() || value.toListRef().empty()) return value;
  auto result = c10::impl::GenericList(value.toList().elementType());
  for (const IValue& each : value.toListRef()) result.push_back(mapped(each, f));
  return result;
}

// One operator's tensors, on the device and as the host sees them.
struct Call {
  std::vector<std::pair<at::Tensor, at::Tensor>> tensors;
  std::vector<std::pair<c10::Storage, c10::Storage>> storages;
  // Tensors with dims that are the host's own.
  std::vector<at::Tensor> of_host;

  c10::Storage on_host(const c10::Storage& storage) {
    if (storage.device_type() == DeviceType::CPU) return storage;
    for (const auto& [gpu, host] : storages)
      if (gpu.is_alias_of(storage)) return host;
    storages.emplace_back(storage, renamed(storage, kHost));
    return storages.back().second;
  }

  at::Tensor on_host(const at::Tensor& x) {
    if (!x.defined()) return x;
    if (!x.is_cuda()) {
      if (x.dim() > 0) of_host.push_back(x);
      return x;
    }
    for (const auto& [gpu, host] : tensors)
      if (gpu.is_same(x)) return host;
    auto result = tensor_over(on_host(x.storage()), x);
    if (x.unsafeGetTensorImpl()->is_wrapped_number())
      result.unsafeGetTensorImpl()->set_wrapped_number(true);
    tensors.emplace_back(x, result);
    return result;
  }

  // A result: an argument, a view of one, or new.
  at::Tensor on_gpu(const at::Tensor& x) {
    if (!x.defined() || x.is_cuda()) return x;
    for (const auto& [gpu, host] : tensors)
      if (host.is_same(x)) return gpu;
    // What an operator returns of the host's tensors, such as `copy_`.
    for (const auto& host : of_host)
      if (host.is_same(x)) return x;
    for (const auto& [gpu, host] : storages)
      if (host.is_alias_of(x.storage())) return tensor_over(gpu, x);
    return tensor_over(renamed(x.storage(), kGpu), x);
  }

  // Does to the tensors of the device what was done to the sizes of the host's.
  void resize() {
    for (const auto& [gpu, host] : tensors) {
      auto* storage = gpu.storage().unsafeGetStorageImpl();
      if (host.storage().data() != storage->data() ||
          host.storage().nbytes() != storage->nbytes()) {
        const auto moved = renamed(host.storage(), kGpu);
        storage->set_nbytes(moved.nbytes());
        std::swap(storage->_mutable_data_ptr_no_checks(),
                  moved.unsafeGetStorageImpl()->_mutable_data_ptr_no_checks());
      }
      if (host.sizes() != gpu.sizes() || host.strides() != gpu.strides() ||
          host.storage_offset() != gpu.storage_offset())
        copy_metadata(host, gpu);
    }
  }
};

// The operators that a GPU waits in, and those that take the host's tensors too.
const std::set<std::string> kWaiting = {
    "_local_scalar_dense", "_unique2",      "equal",
    "masked_select",       "nonzero",       "unique_consecutive",
    "unique_dim"};
const std::set<std::string> kMixing = {
    "_index_put_impl_", "_unsafe_index", "copy_", "index", "index_put",
    "index_put_"};

// Those that ask for a library of a GPU's.
const std::set<std::string> kLibraries = {
    "_use_cudnn_ctc_loss", "_use_miopen_ctc_loss"};

// The kernel of all operators.
void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& arguments = schema.arguments();
  const bool is_aten = schema.name().rfind("aten::", 0) == 0;
  const auto name = is_aten ? schema.name().substr(6) : schema.name();
  const auto begin = stack->size() - arguments.size();
  if (is_aten && kLibraries.count(name)) {
    torch::jit::drop(*stack, arguments.size());
    torch::jit::push(*stack, false);
    return;
  }
  Call call;
  if (name == "copy_") {
    const auto& to = stack->at(begin).toTensor();
    const auto& from = stack->at(begin + 1).toTensor();
    const bool non_blocking = stack->at(begin + 2).toBool();
    if (to.device() != from.device() && !non_blocking) waits(name);
  }
  if (is_aten && kWaiting.count(name)) waits(name);
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto& value = stack->at(begin + i);
    if (value.isDevice()) {
      value = kHost;
    } else if (value.isGenerator()) {
      value = host_of(value.toGenerator());
    } else if (value.isNone() && arguments[i].name() == "generator") {
      value = host_of(default_generator());
    } else {
      value = mapped(
          value, [&](const at::Tensor& x) { return call.on_host(x); });
    }
  }
  if (!call.of_host.empty() && !call.tensors.empty() && !kMixing.count(name)) {
    bool may = false;
    if (may_mix) {
      py::gil_scoped_acquire gil;
      may = (*may_mix)(name).cast<bool>();
    }
    TORCH_CHECK(may, "Expected all tensors to be on the same device, but found ",
                "at least two devices, cuda:0 and cpu! (in ", schema.name(),
                ", a tensor of the host of shape ",
                call.of_host.front().sizes(), ")");
  }
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(stack);
  }
  call.resize();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i)
    stack->at(i) = mapped(
        stack->at(i), [&](const at::Tensor& x) { return call.on_gpu(x); });
}

auto kernel() {
  return torch::CppFunction::makeFromBoxedFunction<&run_on_host>();
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(kernel()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  // Torch's own way to these ends in kernels of the device.
  const std::set<std::string> composite = {
      "convolution", "convolution_backward", "copy_"};
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    if (name.name.rfind("aten::", 0) != 0) continue;
    const auto local = c10::str(name).substr(6);
    const auto op = dispatcher.findSchema(name);
    if (composite.count(local) ||
        (op && op->hasKernelForDispatchKey(c10::DispatchKey::CPU)))
      m.impl(local.c_str(), kernel());
  }
}

// Collectives are the host's, too: those of gloo.
TORCH_LIBRARY_IMPL(c10d, CUDA, m) {
  for (const auto* name :
       {"_allgather_base_", "_reduce_scatter_base_", "allgather_",
        "allgather_into_tensor_coalesced_", "allreduce_",
        "allreduce_coalesced_", "alltoall_", "alltoall_base_", "barrier",
        "broadcast_", "gather_", "recv_", "reduce_", "reduce_scatter_",
        "reduce_scatter_tensor_coalesced_", "scatter_", "send"})
    m.impl(name, kernel());
}

}  // namespace

PYBIND11_MODULE(simulated_gpu_device, m) {
  install_hooks();
  m.def("ask_before_mixing",
        [](py::object function) { may_mix = new py::object(function); });
  m.def("set_sync_debug_mode", [](int mode) { sync_debug_mode = mode; });
  m.def("manual_seed", [](uint64_t seed) {
    host_of(default_generator()).set_current_seed(seed);
  });
}
