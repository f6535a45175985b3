// Graphs: what ran during a capture, done again at each replay.
#include "device.h"

namespace simulated_musa {
namespace {
thread_local Graph* current = nullptr;
}

void Graph::begin_capture() {
  TORCH_CHECK(current == nullptr, "MUSA error: this thread captures a graph already");
  TORCH_CHECK(!captured_, "this graph holds a capture; reset it before the next");
  current = this;
}

void Graph::end_capture() {
  TORCH_CHECK(current == this, "MUSA error: this thread does not capture this graph");
  current = nullptr;
  captured_ = true;
}

void Graph::replay() const {
  TORCH_CHECK(captured_, "called MUSAGraph::replay without a preceding successful capture");
  refuse_in_capture("replaying a graph");
  for (const auto& step : steps_) step();
}

void Graph::reset() {
  steps_.clear();
  captured_ = false;
}

bool capturing() { return current != nullptr; }

void record(std::function<void()> step) {
  if (current != nullptr) current->steps_.push_back(std::move(step));
}

void refuse_in_capture(const std::string& action) {
  TORCH_CHECK(!capturing(), "MUSA error: operation not permitted when stream is capturing (",
              action, ")");
}

}  // namespace simulated_musa
