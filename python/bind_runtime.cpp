#include <pybind11/stl.h>

#include "bindings.h"
#include "runtime/sampler.h"
#include "tensor_caster.h"

namespace qn::python {

namespace py = pybind11;

namespace {

float* logits_of(const PyTensor& logits) {
  QN_CHECK(logits.view.rank == 1 && logits.view.dtype == DType::F32 && logits.view.contiguous() &&
               logits.view.size() > 0,
           "[sampler] logits is ", logits.view.describe(),
           ", expected f32[vocab], dense and not empty");
  return logits.view.as<float>();
}

}  // namespace

void register_runtime(py::module_& module) {
  py::class_<rt::SamplingParams>(module, "SamplingParams")
      .def(py::init([](float temperature, float top_p, float min_p, int top_k,
                       float repetition_penalty, float presence_penalty, float frequency_penalty,
                       std::vector<std::pair<int32_t, float>> logit_bias, uint64_t seed,
                       int logprobs) {
             return rt::SamplingParams{temperature,
                                       top_p,
                                       min_p,
                                       top_k,
                                       repetition_penalty,
                                       presence_penalty,
                                       frequency_penalty,
                                       std::move(logit_bias),
                                       seed,
                                       logprobs};
           }),
           py::kw_only(), py::arg("temperature") = 1.0f, py::arg("top_p") = 1.0f,
           py::arg("min_p") = 0.0f, py::arg("top_k") = 0, py::arg("repetition_penalty") = 1.0f,
           py::arg("presence_penalty") = 0.0f, py::arg("frequency_penalty") = 0.0f,
           py::arg("logit_bias") = std::vector<std::pair<int32_t, float>>{}, py::arg("seed") = 0,
           py::arg("logprobs") = -1)
      .def("validate",
           [](const rt::SamplingParams& params, int64_t vocab) { rt::validate(params, vocab); });

  py::class_<rt::Sampler>(module, "Sampler")
      .def(py::init([](const rt::SamplingParams& params, const std::vector<int32_t>& prompt) {
             return rt::Sampler(params, prompt);
           }),
           py::arg("params"), py::arg("prompt") = std::vector<int32_t>{})
      .def("sample",
           [](rt::Sampler& sampler, const PyTensor& logits) {
             const rt::SampledToken token =
                 sampler.sample(logits_of(logits), logits.view.size(), op_context());
             std::vector<std::pair<int32_t, float>> alternatives;
             for (const rt::TokenLogprob& other : token.alternatives)
               alternatives.emplace_back(other.id, other.logprob);
             return py::make_tuple(token.id, token.logprob, alternatives, token.drawn_logprob);
           })
      .def("distribution",
           [](rt::Sampler& sampler, const PyTensor& logits) {
             return sampler.distribution(logits_of(logits), logits.view.size(), op_context());
           })
      .def_static("uniform", &rt::Sampler::uniform);
}

}  // namespace qn::python
