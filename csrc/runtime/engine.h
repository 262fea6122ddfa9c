// The engine: requests in, tokens out, one step at a time.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/context.h"
#include "model/qwen.h"
#include "model/rope_table.h"
#include "runtime/gpu_runner.h"
#include "runtime/kv_cache.h"
#include "runtime/page_pool.h"
#include "runtime/sampler.h"
#include "runtime/scheduler.h"
#include "runtime/sequence.h"

namespace qn::rt {

struct EngineOptions {
  int threads = 1;
  int64_t context = 0;       // most tokens of one sequence
  int64_t cache_tokens = 0;  // most tokens of all running sequences; at least context
  DType kv_dtype = DType::BF16;
  int64_t max_step_tokens = 512;
  int64_t max_running = 256;
};

enum class FinishReason : uint8_t { None, Stop, Length, Error };

struct Request {
  std::vector<int32_t> prompt;
  SamplingParams sampling;
  int64_t max_new_tokens = 0;
  std::vector<int32_t> stop_ids;
  int n = 1;  // continuations of the prompt, prefilled once; continuation i is seeded with
              // sampling.seed + i
  bool speculate = false;  // draft tokens by prompt lookup; the output stays what it is without
};

/// One new token of continuation `index` of a request; none (and the reason in `error`) when its
/// logits were not usable and it ends with FinishReason::Error.
struct Emitted {
  int64_t request;
  int index;
  SampledToken token;
  FinishReason finish;
  std::string error;
};

/// One caller at a time (a mutex sees to it) adds requests and calls step() until has_work() is
/// false.
class Engine {
 public:
  Engine(std::shared_ptr<const model::QwenModel> model, const EngineOptions& options);
  ~Engine();

  const EngineOptions& options() const { return options_; }
  const model::QwenModel& model() const { return *model_; }

  /// Returns the request's id. Throws ArgumentError when the prompt is empty, has ids outside the
  /// vocabulary or does not leave room for a token in the context.
  int64_t add(const Request& request);
  /// Forgets a request, or one of its continuations, and frees its cache; unknown (finished) ones
  /// are ignored.
  void abort(int64_t request, std::optional<int> index = std::nullopt);
  bool has_work();
  /// Runs at most max_step_tokens tokens and returns what came out, the tokens of one sequence in
  /// order: nothing while prompts are still being read.
  std::vector<Emitted> step();

  /// Calls visit(position, logits) for every position from `first` on, in order; logits [vocab] are
  /// those of the token after it. `prompt_length` fixes dynamic NTK (0 = all tokens).
  using LogitsVisitor = std::function<void(int64_t position, const float* logits)>;
  void evaluate(std::span<const int32_t> tokens, int64_t first, int64_t prompt_length,
                const LogitsVisitor& visit);

  /// log p(token | tokens before it) of tokens 1 .. n-1, the same bits as generation reports.
  std::vector<float> score(std::span<const int32_t> tokens, int64_t prompt_length);

 private:
  struct Sequence;

  void check_tokens(std::span<const int32_t> tokens) const;
  void append_rows(model::BatchPlan& plan, std::span<const int32_t> tokens, int64_t begin,
                   int64_t count, const std::vector<int32_t>& pages,
                   const model::RopeFrequencies& rope) const;
  /// Lets decoding sequences guess their next tokens, and their chunks compute these as well, where
  /// that promises more tokens in the same time. Returns whether any does.
  bool add_drafts(std::vector<Chunk>& chunks);
  /// Draws from `logits` (or takes what a GPU has drawn from them), appends the token and says
  /// whether the sequence ends.
  void emit(Sequence& sequence, float* logits, const GpuRunner::Drawn* drawn,
            std::vector<Emitted>& out);
  /// The other continuations of a prompt that has just been prefilled: they share its cache and
  /// draw from its logits.
  void start_forks(Sequence& first, float* logits, std::vector<Emitted>& out);
  /// Runs the plan; returns the hidden states of its output rows, where the model runs.
  TensorView forward(const model::BatchPlan& plan);
  void for_each_logits_row(const TensorView& hidden, bool exact,
                           const std::function<void(int64_t, float*)>& visit);
  ExecContext context() { return {pool_, workspace_, model_->weights().gpu().get()}; }
  ExecContext host_context() { return {pool_, host_workspace_}; }

  std::shared_ptr<const model::QwenModel> model_;
  EngineOptions options_;
  ThreadPool pool_;
  Workspace workspace_, host_workspace_;
  PagePool pages_;
  KvMemory memory_;
  std::unique_ptr<GpuRunner> gpu_runner_;  // null on the host
  Scheduler scheduler_;
  std::map<std::pair<int64_t, int>, std::unique_ptr<Sequence>> sequences_;  // by request and index
  int64_t next_request_ = 0;
  std::mutex mutex_;
};

}  // namespace qn::rt
