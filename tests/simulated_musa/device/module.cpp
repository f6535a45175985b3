// What Python sees of the device.
#include <torch/csrc/utils/pybind.h>

#include "device.h"

namespace py = pybind11;

namespace simulated_musa {
void route_collectives();

namespace {

// A Python callable that a graph keeps; it is let go of with the interpreter's lock held.
std::shared_ptr<py::object> kept(py::object callable) {
  return {new py::object(std::move(callable)), [](py::object* object) {
            py::gil_scoped_acquire lock;
            delete object;
          }};
}

void record_python(py::object callable) {
  auto step = kept(std::move(callable));
  record([step] {
    py::gil_scoped_acquire lock;
    (*step)();
  });
}

}  // namespace

PYBIND11_MODULE(_MUSAC, module) {
  route_collectives();
  module.doc() = "A simulated MUSA device over host memory.";
  module.def("device_count", [] { return int(device_count()); });
  module.def("current_device", [] { return int(current_device()); });
  module.def("set_device",
             [](int index) { set_current_device(static_cast<c10::DeviceIndex>(index)); });
  module.def("current_stream",
             [](int index) { return current_stream(static_cast<c10::DeviceIndex>(index)); });
  module.def("set_stream", [](int index, int64_t stream) {
    set_current_stream(static_cast<c10::DeviceIndex>(index), stream);
  });
  module.def("allocated_bytes",
             [](int index) { return allocated_bytes(static_cast<c10::DeviceIndex>(index)); });
  module.def("most_allocated_bytes",
             [](int index) { return most_allocated_bytes(static_cast<c10::DeviceIndex>(index)); });
  module.def("alias_on_host", &alias_on_host);
  module.def("set_strict", &set_strict);
  module.def("capturing", &capturing);
  module.def("refuse_in_capture", &refuse_in_capture);
  module.def("record", &record_python);
  py::class_<Graph, std::shared_ptr<Graph>>(module, "Graph")
      .def(py::init<>())
      .def("begin_capture", &Graph::begin_capture)
      .def("end_capture", &Graph::end_capture)
      // Without the interpreter's lock, as PyTorch replays a graph: a thread of gloo may wait for
      // the lock while it holds its queue, which a collective of the graph waits for.
      .def("replay", &Graph::replay, py::call_guard<py::gil_scoped_release>())
      .def("reset", &Graph::reset)
      .def("__len__", &Graph::size);
}

}  // namespace simulated_musa
