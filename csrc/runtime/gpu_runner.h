// Runs a model's steps on a GPU: sends their inputs, replays decoding steps as graphs, draws
// tokens.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "core/context.h"
#include "core/gpu.h"
#include "model/qwen.h"
#include "ops/gpu.h"
#include "runtime/kv_cache.h"

namespace qn::rt {

/// A step that gives every sequence one token is captured as a graph the second time its shape
/// comes up, and replayed from then on. Shapes are rounded up to powers of two, so there are few:
/// the number of sequences (with copies of the first one) and the length of the longest.
class GpuRunner {
 public:
  /// `graphs`: whether to capture any.
  GpuRunner(const model::QwenModel& model, const KvMemory& memory, int64_t context, bool graphs);

  struct Drawn {
    int32_t token;   // -1: the logits leave nothing to draw from
    float log_prob;  // of the draw
  };
  /// Computes the plan and draws a token of each output row; valid until the next call.
  std::span<const Drawn> step(const model::BatchPlan& plan, std::span<const ops::DrawOptions> draws,
                              const ExecContext& context);
  /// Logits of an output row of the last step [vocab], writable, valid until the next call.
  float* logits(int64_t row);

  /// Computes the plan without drawing; returns the hidden states of the output rows.
  TensorView forward(const model::BatchPlan& plan, const ExecContext& context);
  /// Logits of some of these rows, on the host [rows, vocab], valid until the next call.
  float* logits_of(const TensorView& hidden, bool exact, const ExecContext& context);

 private:
  /// Where a step leaves its results, in the GPU's memory.
  struct Outputs {
    TensorView logits;
    TensorView tokens, log_probs;
  };
  using Addresses = std::pair<int64_t, int64_t>;  // generations of workspace and inputs
  /// Captured once the same step has run, and with it made room for everything. Valid while the
  /// addresses of then are given out again.
  struct Graph {
    Addresses addresses;
    Outputs outputs;
    std::unique_ptr<GpuGraph> captured;
  };
  using Shape = std::pair<int64_t, int64_t>;  // sequences, longest

  Outputs compute(const ops::Batch& batch, const ops::DrawInputs& draws, bool exact,
                  const ExecContext& context);
  /// Runs a step of a shape that comes up again.
  Outputs replay(Shape shape, const std::function<Outputs()>& run, const Workspace& workspace);
  float* to_host(const TensorView& logits);

  const model::QwenModel& model_;
  const KvMemory& memory_;
  const Gpu& gpu_;
  int64_t context_;
  bool graphs_enabled_;
  GpuInputs inputs_;
  PinnedBuffer results_, logits_;
  Outputs outputs_;
  std::vector<Drawn> drawn_;
  std::map<Shape, Graph> graphs_;
};

}  // namespace qn::rt
