#include "runtime/engine.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "core/env.h"
#include "core/error.h"
#include "runtime/prompt_lookup.h"

namespace qn::rt {
namespace {

constexpr int64_t kPageTokens = 64;
constexpr int64_t kMaxDraft = 7;    // tokens; more rows cost more than the rarely needed rest gains
constexpr int64_t kLogitRows = 16;  // rows of logits held at once: 16 * 152k * 4 bytes = 10 MB

int64_t pages_for(int64_t tokens) { return (tokens + kPageTokens - 1) / kPageTokens; }

EngineOptions checked(const model::ModelConfig& config, EngineOptions options) {
  QN_CHECK(options.context >= 1, "[engine] context is ", options.context, ", expected at least 1");
  QN_CHECK(options.context <= config.max_position_embeddings, "[engine] context is ",
           options.context, ", expected at most ", config.max_position_embeddings,
           " as the checkpoint's max_position_embeddings");
  QN_CHECK(options.max_step_tokens >= 1, "[engine] max_step_tokens is ", options.max_step_tokens,
           ", expected at least 1");
  QN_CHECK(options.max_running >= 1, "[engine] max_running is ", options.max_running,
           ", expected at least 1");
  options.cache_tokens = std::max(options.cache_tokens, options.context);
  return options;
}

}  // namespace

struct Engine::Sequence : SequenceState {
  int64_t request;
  int index;
  std::vector<int32_t> tokens;  // prompt and generated
  int64_t prompt_length;
  int64_t max_new_tokens;
  std::vector<int32_t> stop_ids;
  model::RopeFrequencies rope;
  Sampler sampler;
  int forks_to_start;  // continuations that wait for this one's prompt
  bool speculate;
  PromptLookup lookup;
  std::vector<int32_t> draft;  // guesses that the step at hand verifies
  bool finished = false;

  Sequence(const Request& r, int64_t id, int index_, model::RopeFrequencies rope_)
      : request(id),
        index(index_),
        tokens(r.prompt),
        prompt_length(static_cast<int64_t>(r.prompt.size())),
        max_new_tokens(r.max_new_tokens),
        stop_ids(r.stop_ids),
        rope(std::move(rope_)),
        sampler(with_seed(r.sampling, index_), r.prompt),
        forks_to_start(index_ == 0 ? r.n - 1 : 0),
        speculate(r.speculate) {
    length = prompt_length;
  }

  static SamplingParams with_seed(SamplingParams params, int index) {
    params.seed += static_cast<uint64_t>(index);
    return params;
  }
};

Engine::Engine(std::shared_ptr<const model::QwenModel> model, const EngineOptions& options)
    : model_(std::move(model)),
      options_(checked(model_->config(), options)),
      pool_(options_.threads),
      workspace_(model_->weights().gpu().get()),
      pages_(pages_for(options_.cache_tokens)),
      memory_(pages_.total(), kPageTokens, model_->config().num_layers,
              model_->config().num_kv_heads, model_->config().head_dim, options_.kv_dtype,
              model_->weights().gpu().get()),
      scheduler_(pages_, kPageTokens, options_.max_step_tokens, options_.max_running) {
  if (model_->weights().gpu() != nullptr) {
    gpu_runner_ =
        std::make_unique<GpuRunner>(*model_, memory_, options_.context, env::cuda_graphs());
  }
}

Engine::~Engine() = default;

void Engine::check_tokens(std::span<const int32_t> tokens) const {
  QN_CHECK(!tokens.empty(), "[engine] the prompt is empty, expected at least one token");
  const int64_t vocab = model_->config().vocab_size;
  for (int32_t token : tokens) {
    QN_CHECK(token >= 0 && token < vocab, "[engine] token id is ", token, ", expected 0 to ",
             vocab - 1);
  }
}

int64_t Engine::add(const Request& request) {
  check_tokens(request.prompt);
  const int64_t length = static_cast<int64_t>(request.prompt.size());
  QN_CHECK(length < options_.context, "[engine] the prompt has ", length,
           " tokens, expected fewer than the context of ", options_.context);
  validate(request.sampling, model_->config().vocab_size);
  QN_CHECK(request.max_new_tokens >= 1, "[engine] max_new_tokens is ", request.max_new_tokens,
           ", expected at least 1");
  QN_CHECK(request.n >= 1 && request.n <= options_.max_running, "[engine] n is ", request.n,
           ", expected 1 to ", options_.max_running);
  std::lock_guard<std::mutex> one_caller(mutex_);
  const int64_t id = next_request_;
  const model::RopeFrequencies rope = model::rope_frequencies(model_->config(), length);
  std::vector<std::unique_ptr<Sequence>> created;
  for (int index = 0; index < request.n; ++index) {
    created.push_back(std::make_unique<Sequence>(request, id, index, rope));
  }
  ++next_request_;
  scheduler_.add(created[0].get());
  for (auto& sequence : created) {
    const int index = sequence->index;
    sequences_[{id, index}] = std::move(sequence);
  }
  return id;
}

void Engine::abort(int64_t request, std::optional<int> index) {
  std::lock_guard<std::mutex> one_caller(mutex_);
  auto it = sequences_.lower_bound({request, index.value_or(0)});
  const auto end =
      sequences_.upper_bound({request, index.value_or(std::numeric_limits<int>::max())});
  while (it != end) {
    scheduler_.remove(it->second.get());
    it = sequences_.erase(it);
  }
}

bool Engine::has_work() {
  std::lock_guard<std::mutex> one_caller(mutex_);
  return !scheduler_.idle();
}

void Engine::append_rows(model::BatchPlan& plan, std::span<const int32_t> tokens, int64_t begin,
                         int64_t count, const std::vector<int32_t>& pages,
                         const model::RopeFrequencies& rope) const {
  const size_t half = rope.inv_freq.size();
  plan.spans.push_back({plan.tokens(), count, begin + count, pages.data()});
  for (int64_t position = begin; position < begin + count; ++position) {
    plan.token_ids.push_back(tokens[static_cast<size_t>(position)]);
    plan.cos.resize(plan.cos.size() + half);
    plan.sin.resize(plan.sin.size() + half);
    model::rope_position(rope, position, plan.cos.data() + plan.cos.size() - half,
                         plan.sin.data() + plan.sin.size() - half);
    if (model_->config().use_logn_attn)
      plan.query_scale.push_back(model::logn_scale(model_->config(), position));
  }
}

TensorView Engine::forward(const model::BatchPlan& plan) {
  if (gpu_runner_ != nullptr) return gpu_runner_->forward(plan, context());
  const int64_t rows = static_cast<int64_t>(plan.output_rows.size());
  const int64_t cols = model_->config().hidden_size;
  const TensorView hidden(workspace_.allocate_array<float>(rows * cols), DType::F32, {rows, cols});
  model_->forward(hidden, plan.batch(), memory_.layers(), plan.exact, context());
  return hidden;
}

void Engine::for_each_logits_row(const TensorView& hidden, bool exact,
                                 const std::function<void(int64_t, float*)>& visit) {
  Workspace::Scope scratch(workspace_);
  const int64_t vocab = model_->config().vocab_size, rows = hidden.shape[0];
  float* logits = gpu_runner_ != nullptr
                      ? nullptr
                      : workspace_.allocate_array<float>(std::min(rows, kLogitRows) * vocab);
  for (int64_t row = 0; row < rows; row += kLogitRows) {
    const TensorView some = hidden.rows(row, std::min(row + kLogitRows, rows));
    const int64_t count = some.shape[0];
    if (gpu_runner_ != nullptr)
      logits = gpu_runner_->logits_of(some, exact, context());
    else
      model_->logits(TensorView(logits, DType::F32, {count, vocab}), some, exact, context());
    for (int64_t i = 0; i < count; ++i) visit(row + i, logits + i * vocab);
  }
}

bool Engine::add_drafts(std::vector<Chunk>& chunks) {
  if (gpu_runner_ != nullptr) return false;
  const auto decodes = [](const Chunk& chunk) {
    const SequenceState& sequence = *chunk.sequence;
    return chunk.count == 1 && sequence.computed + 1 == sequence.length;
  };
  StepEstimate step(std::count_if(chunks.begin(), chunks.end(), decodes), ops::token_cost());
  bool any = false;
  for (Chunk& chunk : chunks) {
    Sequence& sequence = *static_cast<Sequence*>(chunk.sequence);
    sequence.draft.clear();
    if (!sequence.speculate || sequence.forks_to_start > 0 || !decodes(chunk)) continue;
    sequence.lookup.update(sequence.tokens);
    const int64_t useful =
        std::min(sequence.prompt_length + sequence.max_new_tokens, options_.context) -
        sequence.length - 1;
    sequence.lookup.draft(sequence.tokens, std::min(useful, kMaxDraft), step, sequence.draft);
    const int64_t drafts = scheduler_.extend(chunk, static_cast<int64_t>(sequence.draft.size()));
    sequence.draft.resize(static_cast<size_t>(drafts));
    any = any || drafts > 0;
  }
  return any;
}

std::vector<Emitted> Engine::step() {
  std::lock_guard<std::mutex> one_caller(mutex_);
  workspace_.reset();
  std::vector<Chunk> chunks = scheduler_.schedule();
  if (chunks.empty()) return {};
  int64_t tokens = 0;
  for (const Chunk& chunk : chunks) tokens += chunk.count;

  model::BatchPlan plan;
  // Drafts may not change how 4-bit weights round.
  plan.exact = add_drafts(chunks) && tokens < ops::folded_tokens();
  struct OutputRow {
    Sequence* sequence;
    int64_t position;
  };
  std::vector<OutputRow> output_rows;
  for (const Chunk& chunk : chunks) {
    Sequence* sequence = static_cast<Sequence*>(chunk.sequence);  // all of ours are
    std::vector<int32_t>& known = sequence->tokens;
    known.insert(known.end(), sequence->draft.begin(), sequence->draft.end());
    append_rows(plan, known, sequence->computed, chunk.count, sequence->pages, sequence->rope);
    known.resize(static_cast<size_t>(sequence->length));
    const int64_t end = sequence->computed + chunk.count;
    for (int64_t position = sequence->length - 1; position < end; ++position) {
      plan.output_rows.push_back(static_cast<int32_t>(plan.tokens() - (end - position)));
      output_rows.push_back({sequence, position});
    }
  }
  std::vector<Emitted> out;
  const auto visit = [&](int64_t row, float* logits, const GpuRunner::Drawn* drawn) {
    const auto [sequence, position] = output_rows[static_cast<size_t>(row)];
    const int32_t input =
        plan.token_ids[static_cast<size_t>(plan.output_rows[static_cast<size_t>(row)])];
    const bool follows =
        !sequence->finished && sequence->length == position + 1 && sequence->tokens.back() == input;
    if (!follows) return;  // a guess before this one, or this one, was wrong
    if (sequence->forks_to_start > 0) start_forks(*sequence, logits, out);
    emit(*sequence, logits, drawn, out);
  };
  const auto advance = [&] {
    for (const Chunk& chunk : chunks) chunk.sequence->computed += chunk.count;
  };
  if (gpu_runner_ == nullptr) {
    const TensorView hidden = forward(plan);
    advance();
    for_each_logits_row(hidden, plan.exact,
                        [&](int64_t row, float* logits) { visit(row, logits, nullptr); });
  } else {
    std::vector<std::optional<ops::DrawOptions>> options;
    std::vector<ops::DrawOptions> draws;
    for (const auto& [sequence, position] : output_rows) {
      // Forks draw from the same logits, each with its own seed.
      options.push_back(sequence->forks_to_start > 0 ? std::nullopt
                                                     : sequence->sampler.draw_options());
      draws.push_back(options.back().value_or(ops::DrawOptions{}));
    }
    const std::span<const GpuRunner::Drawn> drawn = gpu_runner_->step(plan, draws, context());
    advance();
    for (size_t row = 0; row < drawn.size(); ++row) {
      const int64_t index = static_cast<int64_t>(row);
      if (options[row])
        visit(index, nullptr, &drawn[row]);
      else
        visit(index, gpu_runner_->logits(index), nullptr);
    }
  }
  for (const Chunk& chunk : chunks) {
    SequenceState& sequence = *chunk.sequence;
    if (sequence.computed >= sequence.length) scheduler_.roll_back(sequence, sequence.length - 1);
  }
  for (const Emitted& emitted : out) {
    if (emitted.finish == FinishReason::None) continue;
    const auto finished = sequences_.find({emitted.request, emitted.index});
    scheduler_.remove(finished->second.get());
    sequences_.erase(finished);
  }
  return out;
}

void Engine::emit(Sequence& sequence, float* logits, const GpuRunner::Drawn* drawn,
                  std::vector<Emitted>& out) {
  Emitted emitted{sequence.request, sequence.index, {}, FinishReason::None, {}};
  try {
    emitted.token = drawn != nullptr ? sequence.sampler.accept(drawn->token, drawn->log_prob)
                                     : sequence.sampler.sample(logits, model_->config().vocab_size,
                                                               host_context());
  } catch (const Error& error) {
    emitted.finish = FinishReason::Error;
    emitted.error = error.what();
  }
  if (emitted.finish == FinishReason::None) {
    sequence.tokens.push_back(emitted.token.id);
    ++sequence.length;
    if (std::find(sequence.stop_ids.begin(), sequence.stop_ids.end(), emitted.token.id) !=
        sequence.stop_ids.end()) {
      emitted.finish = FinishReason::Stop;
    } else if (sequence.length - sequence.prompt_length >= sequence.max_new_tokens ||
               sequence.length >= options_.context) {
      emitted.finish = FinishReason::Length;
    }
  }
  sequence.finished = emitted.finish != FinishReason::None;
  out.push_back(std::move(emitted));
}

void Engine::start_forks(Sequence& first, float* logits, std::vector<Emitted>& out) {
  for (int index = 1; index <= first.forks_to_start; ++index) {
    const auto found = sequences_.find({first.request, index});
    if (found == sequences_.end()) continue;  // aborted meanwhile
    Sequence& fork = *found->second;
    const Scheduler::PageCopy copy = scheduler_.fork(fork, first);
    if (copy.to >= 0) memory_.copy_page(copy.to, copy.from);
    scheduler_.add(&fork);
    emit(fork, logits, nullptr, out);
  }
  first.forks_to_start = 0;
}

void Engine::evaluate(std::span<const int32_t> tokens, int64_t first, int64_t prompt_length,
                      const LogitsVisitor& visit) {
  check_tokens(tokens);
  const int64_t length = static_cast<int64_t>(tokens.size());
  QN_CHECK(length <= options_.context, "[engine] there are ", length,
           " tokens, expected at most the context of ", options_.context);
  QN_CHECK(prompt_length >= 0 && prompt_length <= length, "[engine] prompt_length is ",
           prompt_length, ", expected 0 to ", length);
  std::lock_guard<std::mutex> one_caller(mutex_);
  QN_CHECK(pages_for(length) <= pages_.free(), "[engine] ", length, " tokens need ",
           pages_for(length), " cache pages, but running requests have left ", pages_.free());
  const model::RopeFrequencies rope =
      model::rope_frequencies(model_->config(), prompt_length == 0 ? length : prompt_length);
  struct Pages {
    PagePool& pool;
    std::vector<int32_t> pages;
    ~Pages() {
      for (int32_t page : pages) pool.release(page);
    }
  } held{pages_, {}};
  for (int64_t page = 0; page < pages_for(length); ++page) held.pages.push_back(*pages_.allocate());

  for (int64_t begin = 0; begin < length; begin += options_.max_step_tokens) {
    workspace_.reset();
    const int64_t count = std::min(options_.max_step_tokens, length - begin);
    model::BatchPlan plan;
    append_rows(plan, tokens, begin, count, held.pages, rope);
    for (int64_t row = std::max<int64_t>(0, first - begin); row < count; ++row) {
      plan.output_rows.push_back(static_cast<int32_t>(row));
    }
    const int64_t rows = static_cast<int64_t>(plan.output_rows.size());
    const int64_t first_position = begin + count - rows;
    for_each_logits_row(forward(plan), plan.exact,
                        [&](int64_t row, float* logits) { visit(first_position + row, logits); });
  }
}

std::vector<float> Engine::score(std::span<const int32_t> tokens, int64_t prompt_length) {
  const int64_t vocab = model_->config().vocab_size;
  std::vector<float> result;
  evaluate(tokens, 0, prompt_length, [&](int64_t position, const float* logits) {
    if (position + 1 == static_cast<int64_t>(tokens.size())) return;
    const TensorView row(const_cast<float*>(logits), DType::F32, {vocab});
    const float log_total = ops::log_sum_exp(row, host_context());
    result.push_back(logits[tokens[static_cast<size_t>(position + 1)]] - log_total);
  });
  return result;
}

}  // namespace qn::rt
