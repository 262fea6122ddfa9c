#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "bindings.h"
#include "core/error.h"
#include "model/qwen.h"
#include "runtime/engine.h"

namespace qn::python {

namespace py = pybind11;

namespace {

template <typename T>
T field(const py::dict& dict, const char* name) {
  QN_CHECK(dict.contains(name), "[model] config field ", name, " is missing");
  return dict[name].cast<T>();
}

model::ModelConfig config_from_dict(const py::dict& dict) {
  model::ModelConfig c;
  c.architecture = field<std::string>(dict, "architecture");
  c.hidden_size = field<int64_t>(dict, "hidden_size");
  c.intermediate_size = field<int64_t>(dict, "intermediate_size");
  c.num_layers = field<int64_t>(dict, "num_layers");
  c.num_heads = field<int64_t>(dict, "num_heads");
  c.num_kv_heads = field<int64_t>(dict, "num_kv_heads");
  c.head_dim = field<int64_t>(dict, "head_dim");
  c.vocab_size = field<int64_t>(dict, "vocab_size");
  c.max_position_embeddings = field<int64_t>(dict, "max_position_embeddings");
  c.rms_norm_eps = field<double>(dict, "rms_norm_eps");
  c.rope_theta = field<double>(dict, "rope_theta");
  c.rope_dim = field<int64_t>(dict, "rope_dim");
  c.tie_word_embeddings = field<bool>(dict, "tie_word_embeddings");
  c.qkv_bias = field<bool>(dict, "qkv_bias");
  c.qk_norm = field<bool>(dict, "qk_norm");
  c.sliding_window = field<std::optional<int64_t>>(dict, "sliding_window").value_or(0);
  c.max_window_layers = field<int64_t>(dict, "max_window_layers");
  c.use_dynamic_ntk = field<bool>(dict, "use_dynamic_ntk");
  c.use_logn_attn = field<bool>(dict, "use_logn_attn");
  c.seq_length = field<int64_t>(dict, "seq_length");
  if (const py::object yarn = dict["yarn"]; !yarn.is_none()) {
    const py::dict y = yarn;
    c.yarn = {field<double>(y, "factor"), field<int64_t>(y, "original_max_position_embeddings"),
              field<double>(y, "attention_factor"), field<double>(y, "beta_fast"),
              field<double>(y, "beta_slow")};
  }
  return c;
}

model::RequestedFormat requested_format(const std::string& name) {
  if (name == "auto") return std::nullopt;
  for (WeightFormat format :
       {WeightFormat::F32, WeightFormat::BF16, WeightFormat::Int8, WeightFormat::Int4}) {
    if (name == model::format_name(format)) return format;
  }
  throw ArgumentError("[model] weights is '" + name +
                      "', expected one of auto, int4, int8, bf16, f32");
}

std::pair<int64_t, int64_t> rows_and_cols(const std::string& name,
                                          const std::vector<int64_t>& shape) {
  QN_CHECK(shape.size() == 1 || shape.size() == 2, "[model] tensor ", name, " has ", shape.size(),
           " dimensions, expected 1 or 2");
  return {shape.size() == 2 ? shape[0] : 1, shape.back()};
}

/// Lets go of `data` where the last copy goes, in any thread.
std::shared_ptr<const void> keep(const py::buffer& data) {
  return {new py::buffer(data), [](const void* kept) {
            py::gil_scoped_acquire locked;
            delete static_cast<const py::buffer*>(kept);
          }};
}

void check_size(const std::string& name, const py::buffer_info& info, size_t expected) {
  const size_t bytes = static_cast<size_t>(info.size * info.itemsize);
  QN_CHECK(bytes == expected, "[model] tensor ", name, " has ", bytes, " bytes, expected ",
           expected);
}

/// Packs a checkpoint tensor by tensor; finish() makes the model.
class ModelBuilder {
 public:
  ModelBuilder(const py::dict& config, const std::string& weights, bool invariant, int threads,
               std::shared_ptr<const Gpu> gpu)
      : config_(config_from_dict(config)),
        invariant_(invariant),
        pool_(threads),
        weights_(
            std::make_unique<model::Weights>(config_, requested_format(weights), std::move(gpu))) {}

  /// `shape` has one or two dimensions. `release(begin, end)` is called with byte ranges of `data`
  /// that have been packed; data that is used in place is kept alive.
  void add(const std::string& name, const std::string& type, const std::vector<int64_t>& shape,
           const py::buffer& data, const py::object& release) {
    const SourceType source = ops::source_type_from_name(type);
    const auto [rows, cols] = rows_and_cols(name, shape);
    const py::buffer_info info = data.request();
    check_size(name, info, ops::source_bytes(source, rows, cols));
    const std::shared_ptr<const void> owner = keep(data);
    const auto release_range = [&release](size_t begin, size_t end) {
      py::gil_scoped_acquire locked;
      release(begin, end);
    };
    py::gil_scoped_release unlocked;
    workspace_.reset();
    weights_->add({name, source, rows, cols, info.ptr, owner, release_range}, {pool_, workspace_});
  }

  /// Takes a tensor that has the engine's layout; `data` is used where it lies.
  void add_packed(const std::string& name, const std::string& format,
                  const std::vector<int64_t>& shape, const py::buffer& data) {
    const WeightFormat packed = ops::weight_format_from_name(format);
    const auto [rows, cols] = rows_and_cols(name, shape);
    const py::buffer_info info = data.request();
    check_size(name, info, ops::weight_bytes(packed, rows, cols));
    weights_->add_packed({name, {info.ptr, packed, rows, cols, cols}, keep(data)});
  }

  std::shared_ptr<model::QwenModel> finish() {
    QN_CHECK(weights_ != nullptr, "[model] finish() was called twice");
    weights_->finish();
    return std::make_shared<model::QwenModel>(config_, std::move(weights_), invariant_);
  }

 private:
  model::ModelConfig config_;
  bool invariant_;
  ThreadPool pool_;
  Workspace workspace_;
  std::unique_ptr<model::Weights> weights_;
};

const char* finish_name(rt::FinishReason reason) {
  return reason == rt::FinishReason::Stop     ? "stop"
         : reason == rt::FinishReason::Length ? "length"
         : reason == rt::FinishReason::Error  ? "error"
                                              : nullptr;
}

py::array_t<float> engine_logits(rt::Engine& engine, const std::vector<int32_t>& tokens,
                                 int64_t last, int64_t prompt_length) {
  const int64_t length = static_cast<int64_t>(tokens.size());
  QN_CHECK(last >= 1 && last <= std::max<int64_t>(length, 1), "[logits] last is ", last,
           ", expected 1 to ", length);
  const int64_t vocab = engine.model().config().vocab_size;
  py::array_t<float> result({last, vocab});
  float* rows = result.mutable_data();
  py::gil_scoped_release unlocked;
  engine.evaluate(tokens, length - last, prompt_length, [&](int64_t position, const float* logits) {
    std::memcpy(rows + (position - (length - last)) * vocab, logits,
                static_cast<size_t>(vocab) * sizeof(float));
  });
  return result;
}

}  // namespace

void register_engine(py::module_& module) {
  py::class_<model::QwenModel, std::shared_ptr<model::QwenModel>>(module, "Model")
      .def_property_readonly("weight_bytes",
                             [](const model::QwenModel& m) { return m.weights().total_bytes(); })
      .def_property_readonly("bytes_by_format", [](const model::QwenModel& m) {
        return m.weights().bytes_by_format();
      });

  py::class_<ModelBuilder>(module, "ModelBuilder")
      .def(py::init<const py::dict&, const std::string&, bool, int, std::shared_ptr<const Gpu>>(),
           py::arg("config"), py::arg("weights"), py::arg("invariant"), py::arg("threads"),
           py::arg("gpu") = nullptr)
      .def("add", &ModelBuilder::add, py::arg("name"), py::arg("type"), py::arg("shape"),
           py::arg("data"), py::arg("release"))
      .def("add_packed", &ModelBuilder::add_packed, py::arg("name"), py::arg("format"),
           py::arg("shape"), py::arg("data"))
      .def("finish", &ModelBuilder::finish);
  module.def("chosen_format", [](const std::string& weights, const std::string& source) {
    return model::format_name(
        model::choose_format(requested_format(weights), ops::source_type_from_name(source)));
  });
  module.def("is_vector", &model::is_vector);

  py::class_<rt::Engine>(module, "Engine")
      .def(py::init([](std::shared_ptr<model::QwenModel> model, int threads, int64_t context,
                       int64_t cache_tokens, const std::string& dtype, int64_t max_step_tokens,
                       int64_t max_running) {
             const rt::EngineOptions options{threads,         context,         cache_tokens,
                                             kv_dtype(dtype), max_step_tokens, max_running};
             return std::make_unique<rt::Engine>(std::move(model), options);
           }),
           py::arg("model"), py::kw_only(), py::arg("threads"), py::arg("context"),
           py::arg("cache_tokens"), py::arg("kv_dtype"), py::arg("max_step_tokens") = 512,
           py::arg("max_running") = 256)
      .def(
          "add",
          [](rt::Engine& engine, const std::vector<int32_t>& prompt,
             const rt::SamplingParams& sampling, int64_t max_new_tokens,
             const std::vector<int32_t>& stop_ids, int n, bool speculate) {
            py::gil_scoped_release unlocked;
            return engine.add({prompt, sampling, max_new_tokens, stop_ids, n, speculate});
          },
          py::arg("prompt"), py::arg("sampling"), py::kw_only(), py::arg("max_new_tokens"),
          py::arg("stop_ids"), py::arg("n") = 1, py::arg("speculate") = false)
      .def("abort", &rt::Engine::abort, py::arg("request"), py::arg("index") = std::nullopt,
           py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("has_work", &rt::Engine::has_work)
      .def("step",
           [](rt::Engine& engine) {
             std::vector<rt::Emitted> emitted;
             {
               py::gil_scoped_release unlocked;
               emitted = engine.step();
             }
             py::list out;
             for (const rt::Emitted& e : emitted) {
               py::list top;
               for (const rt::TokenLogprob& t : e.token.alternatives)
                 top.append(py::make_tuple(t.id, t.logprob));
               out.append(py::make_tuple(e.request, e.index, e.token.id, e.token.logprob, top,
                                         finish_name(e.finish), e.error, e.token.drawn_logprob));
             }
             return out;
           })
      .def("logits", &engine_logits, py::arg("tokens"), py::arg("last"),
           py::arg("prompt_length") = 0)
      .def(
          "score",
          [](rt::Engine& engine, const std::vector<int32_t>& tokens, int64_t prompt_length) {
            std::vector<float> scores;
            {
              py::gil_scoped_release unlocked;
              scores = engine.score(tokens, prompt_length);
            }
            return py::array_t<float>(static_cast<py::ssize_t>(scores.size()), scores.data());
          },
          py::arg("tokens"), py::arg("prompt_length") = 0);
}

}  // namespace qn::python
