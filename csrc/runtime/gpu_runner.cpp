#include "runtime/gpu_runner.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace qn::rt {
namespace {

constexpr int64_t kShortest = 256;  // keys; shorter sequences share graphs

int64_t power_of_two(int64_t n) {
  return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(n)));
}

bool only_decodes(const model::BatchPlan& plan) {
  return plan.output_rows.size() == plan.spans.size() &&
         std::all_of(plan.spans.begin(), plan.spans.end(),
                     [](const ops::SequenceSpan& span) { return span.query_count == 1; });
}

int64_t longest(const model::BatchPlan& plan) {
  int64_t result = 0;
  for (const ops::SequenceSpan& span : plan.spans) result = std::max(result, span.kv_len);
  return result;
}

}  // namespace

GpuRunner::GpuRunner(const model::QwenModel& model, const KvMemory& memory, int64_t context,
                     bool graphs)
    : model_(model),
      memory_(memory),
      gpu_(*model.weights().gpu()),
      context_(context),
      graphs_enabled_(graphs),
      inputs_(gpu_) {}

GpuRunner::Outputs GpuRunner::compute(const ops::Batch& batch, const ops::DrawInputs& draws,
                                      bool exact, const ExecContext& context) {
  const model::ModelConfig& c = model_.config();
  const int64_t rows = batch.output_rows.shape[0];
  Workspace& workspace = context.workspace;
  const TensorView hidden(workspace.allocate(static_cast<size_t>(rows * c.hidden_size) * 2),
                          DType::BF16, {rows, c.hidden_size});
  Outputs outputs;
  outputs.logits = TensorView(workspace.allocate_array<float>(rows * c.vocab_size), DType::F32,
                              {rows, c.vocab_size});
  outputs.tokens = TensorView(workspace.allocate_array<int32_t>(rows), DType::I32, {rows});
  outputs.log_probs = TensorView(workspace.allocate_array<float>(rows), DType::F32, {rows});
  model_.forward(hidden, batch, memory_.layers(), exact, context);
  if (rows == 0) return outputs;
  model_.logits(outputs.logits, hidden, exact, context);
  ops::draw_tokens(outputs.tokens, outputs.log_probs, outputs.logits, draws, context);
  return outputs;
}

std::span<const GpuRunner::Drawn> GpuRunner::step(const model::BatchPlan& plan,
                                                  std::span<const ops::DrawOptions> draws,
                                                  const ExecContext& context) {
  const ops::Batch host = plan.batch();
  const int64_t rows = static_cast<int64_t>(plan.output_rows.size());
  Shape shape{static_cast<int64_t>(plan.spans.size()), longest(plan)};
  const bool repeats = graphs_enabled_ && only_decodes(plan);
  if (repeats) {
    shape.first = power_of_two(shape.first);
    shape.second = std::min(power_of_two(std::max(shape.second, kShortest)), context_);
  }
  const int64_t all_rows = repeats ? shape.first : rows;
  std::vector<ops::DrawOptions> options(draws.begin(), draws.end());
  options.resize(static_cast<size_t>(all_rows));
  const int64_t page_tokens = memory_.page_tokens();
  inputs_.begin(ops::batch_bytes(host, shape.first, shape.second, page_tokens) +
                ops::draw_bytes(all_rows));
  const ops::Batch batch = ops::upload_batch(host, shape.first, shape.second, page_tokens, inputs_);
  const ops::DrawInputs draw_inputs = ops::upload_draws(options, inputs_);
  inputs_.send();

  const size_t result_bytes = static_cast<size_t>(all_rows) * sizeof(int32_t);
  if (results_.size() < 2 * result_bytes) {
    results_ = {};
    results_ = PinnedBuffer(gpu_, 2 * result_bytes);
  }
  const auto run = [&] { return compute(batch, draw_inputs, plan.exact, context); };
  outputs_ = repeats ? replay(shape, run, context.workspace) : run();
  char* results = static_cast<char*>(results_.data());
  gpu_.copy(results, outputs_.tokens.data, result_bytes);
  gpu_.copy(results + result_bytes, outputs_.log_probs.data, result_bytes);
  if (rows > 0) gpu_.sync();
  drawn_.resize(static_cast<size_t>(rows));
  for (size_t row = 0; row < drawn_.size(); ++row) {
    std::memcpy(&drawn_[row].token, results + row * sizeof(int32_t), sizeof(int32_t));
    std::memcpy(&drawn_[row].log_prob, results + result_bytes + row * sizeof(float), sizeof(float));
  }
  return drawn_;
}

GpuRunner::Outputs GpuRunner::replay(Shape shape, const std::function<Outputs()>& run,
                                     const Workspace& workspace) {
  const Addresses addresses{workspace.generation(), inputs_.generation()};
  const auto found = graphs_.find(shape);
  if (found == graphs_.end() || found->second.addresses != addresses) {
    const Outputs outputs = run();
    graphs_[shape] = {{workspace.generation(), inputs_.generation()}, outputs, nullptr};
    return outputs;
  }
  Graph& graph = found->second;
  if (graph.captured == nullptr) {
    auto captured = std::make_unique<GpuGraph>(gpu_);
    graph.outputs = run();
    captured->finish();
    graph.captured = std::move(captured);
  }
  graph.captured->launch();
  return graph.outputs;
}

float* GpuRunner::to_host(const TensorView& logits) {
  const size_t bytes = static_cast<size_t>(logits.size()) * sizeof(float);
  if (logits_.size() < bytes) {
    logits_ = {};
    logits_ = PinnedBuffer(gpu_, bytes);
  }
  gpu_.copy(logits_.data(), logits.data, bytes);
  gpu_.sync();
  return static_cast<float*>(logits_.data());
}

float* GpuRunner::logits(int64_t row) { return to_host(outputs_.logits.rows(row, row + 1)); }

TensorView GpuRunner::forward(const model::BatchPlan& plan, const ExecContext& context) {
  const ops::Batch host = plan.batch();
  const int64_t sequences = static_cast<int64_t>(plan.spans.size());
  const int64_t page_tokens = memory_.page_tokens();
  inputs_.begin(ops::batch_bytes(host, sequences, longest(plan), page_tokens));
  const ops::Batch batch = ops::upload_batch(host, sequences, longest(plan), page_tokens, inputs_);
  inputs_.send();
  const int64_t rows = static_cast<int64_t>(plan.output_rows.size());
  const int64_t cols = model_.config().hidden_size;
  const TensorView hidden(context.workspace.allocate(static_cast<size_t>(rows * cols) * 2),
                          DType::BF16, {rows, cols});
  model_.forward(hidden, batch, memory_.layers(), plan.exact, context);
  return hidden;
}

float* GpuRunner::logits_of(const TensorView& hidden, bool exact, const ExecContext& context) {
  const Workspace::Scope scratch(context.workspace);
  const int64_t rows = hidden.shape[0], vocab = model_.config().vocab_size;
  const TensorView logits(context.workspace.allocate_array<float>(rows * vocab), DType::F32,
                          {rows, vocab});
  model_.logits(logits, hidden, exact, context);
  return to_host(logits);
}

}  // namespace qn::rt
