#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "ops/gpu.h"
#include "ops/ops.h"
#include "tensor_caster.h"
#include "weight_caster.h"

namespace qn::python {

namespace py = pybind11;

namespace {

struct PySegment {
  PyWeight weight;
  std::optional<PyDeviceTensor> bias;
  int64_t out_offset;
};

void meet(const OpDevice*& all, const std::vector<PySegment>& segments) {
  for (const PySegment& segment : segments) {
    meet(all, segment.weight);
    meet(all, segment.bias);
  }
}

ops::LinearSegment linear_segment(const PySegment& segment) {
  ops::LinearSegment result{segment.weight.view, nullptr, segment.out_offset};
  if (segment.bias) {
    const TensorView& bias = segment.bias->view;
    const DType dtype = segment.bias->device.on_gpu ? DType::BF16 : DType::F32;
    QN_CHECK(bias.rank == 1 && bias.dtype == dtype && bias.contiguous() &&
                 bias.shape[0] == result.weight.rows,
             "[linear] bias is ", bias.describe(), ", expected ", dtype_name(dtype), "[",
             result.weight.rows, "], dense");
    result.bias = bias.data;
  }
  return result;
}

/// KvPages of qwen_native/ops.py: pool int32 [pages, words of a page], page_tokens, num_kv_heads,
/// head_dim, dtype, key_scale
using PyPages =
    std::tuple<PyTensor, int64_t, int64_t, int64_t, std::string, std::optional<PyTensor>>;

ops::KvLayer kv_layer(const PyPages& pages) {
  const auto& [pool, page_tokens, num_kv_heads, head_dim, dtype_name, key_scale] = pages;
  const DType dtype = kv_dtype(dtype_name);
  const size_t page_bytes = ops::kv_page_bytes(page_tokens, num_kv_heads, head_dim, dtype);
  QN_CHECK(pool.view.dtype == DType::I32 && pool.view.rank == 2 && pool.view.contiguous() &&
               pool.view.shape[1] * 4 == static_cast<int64_t>(page_bytes),
           "[kv_cache] pool is ", pool.view.describe(), ", expected dense i32[pages, ",
           page_bytes / 4, "]");
  ops::KvLayer layer{
      pool.view.data, static_cast<int64_t>(page_bytes), page_tokens, num_kv_heads, head_dim, dtype};
  if (key_scale) {
    const TensorView& factors = key_scale->view;
    QN_CHECK(factors.dtype == DType::F32 && factors.rank == 2 && factors.contiguous() &&
                 factors.shape[0] == num_kv_heads && factors.shape[1] == head_dim,
             "[kv_cache] key_scale is ", factors.describe(), ", expected dense f32[", num_kv_heads,
             ", ", head_dim, "]");
    layer.key_scale = factors.as<const float>();
  }
  return layer;
}

/// (query_begin, query_count, kv_len, page_table)
using PySpan = std::tuple<int64_t, int64_t, int64_t, std::vector<int32_t>>;

std::vector<ops::SequenceSpan> sequence_spans(const std::vector<PySpan>& spans,
                                              const PyPages& pages) {
  const TensorView& pool = std::get<0>(pages).view;
  const int64_t page_tokens = std::get<1>(pages);
  std::vector<ops::SequenceSpan> result;
  for (const auto& [query_begin, query_count, kv_len, page_table] : spans) {
    const int64_t needed = (kv_len + page_tokens - 1) / page_tokens;
    QN_CHECK(static_cast<int64_t>(page_table.size()) >= needed, "[kv_cache] page table has ",
             page_table.size(), " pages, expected ", needed, " for ", kv_len, " tokens");
    for (const int32_t page : page_table) {
      QN_CHECK(page >= 0 && page < pool.shape[0], "[kv_cache] page number is ", page,
               ", expected 0 to ", pool.shape[0] - 1);
    }
    result.push_back({query_begin, query_count, kv_len, page_table.data()});
  }
  return result;
}

}  // namespace

DType kv_dtype(const std::string& name) {
  for (const DType dtype : {DType::F32, DType::BF16, DType::I8}) {
    if (name == dtype_name(dtype)) return dtype;
  }
  throw ArgumentError("kv_dtype is '" + name + "', expected f32, bf16 or int8");
}

void register_ops(py::module_& module) {
  module.def("rms_norm", [](const PyDeviceTensor& out, const PyDeviceTensor& x,
                            const PyDeviceTensor& weight, float eps,
                            const std::optional<PyDeviceTensor>& residual) {
    py::gil_scoped_release unlocked;
    ops::rms_norm(out.view, x.view, weight.view, eps, residual ? &residual->view : nullptr,
                  op_context(common_device(out, x, weight, residual)));
  });

  py::class_<PySegment>(module, "LinearSegment")
      .def(py::init([](const PyWeight& weight, const std::optional<PyDeviceTensor>& bias,
                       int64_t out_offset) { return PySegment{weight, bias, out_offset}; }));
  module.def("linear", [](const PyDeviceTensor& out, const PyDeviceTensor& x,
                          const std::vector<PySegment>& segments, bool add, bool invariant) {
    py::gil_scoped_release unlocked;
    std::vector<ops::LinearSegment> native;
    for (const PySegment& segment : segments) native.push_back(linear_segment(segment));
    ops::linear(out.view, x.view, native, add ? ops::Epilogue::Add : ops::Epilogue::Store,
                invariant, op_context(common_device(out, x, segments)));
  });
  module.def("linear_w8a8", [](const PyDeviceTensor& out, const PyDeviceTensor& x,
                               const PyDeviceTensor& codes, const PyDeviceTensor& scales,
                               const std::optional<PyDeviceTensor>& bias) {
    py::gil_scoped_release unlocked;
    ops::linear_w8a8(out.view, x.view, codes.view, scales.view, bias ? &bias->view : nullptr,
                     op_context(common_device(out, x, codes, scales, bias)));
  });
  module.def("rope",
             [](const PyDeviceTensor& x, const PyDeviceTensor& cos, const PyDeviceTensor& sin) {
               py::gil_scoped_release unlocked;
               ops::rope(x.view, cos.view, sin.view, op_context(common_device(x, cos, sin)));
             });
  module.def("swiglu",
             [](const PyDeviceTensor& out, const PyDeviceTensor& gate, const PyDeviceTensor& up) {
               py::gil_scoped_release unlocked;
               ops::swiglu(out.view, gate.view, up.view, op_context(common_device(out, gate, up)));
             });
  module.def("rms_norm_bwd", [](const PyDeviceTensor& dx, const PyDeviceTensor& dweight,
                                const PyDeviceTensor& dy, const PyDeviceTensor& x,
                                const PyDeviceTensor& weight, float eps,
                                const std::optional<PyDeviceTensor>& residual_grad) {
    py::gil_scoped_release unlocked;
    ops::rms_norm_bwd(dx.view, dweight.view, dy.view, x.view, weight.view, eps,
                      residual_grad ? &residual_grad->view : nullptr,
                      op_context(common_device(dx, dweight, dy, x, weight, residual_grad)));
  });
  module.def("swiglu_bwd",
             [](const PyDeviceTensor& dgate, const PyDeviceTensor& dup, const PyDeviceTensor& dout,
                const PyDeviceTensor& gate, const PyDeviceTensor& up) {
               py::gil_scoped_release unlocked;
               ops::swiglu_bwd(dgate.view, dup.view, dout.view, gate.view, up.view,
                               op_context(common_device(dgate, dup, dout, gate, up)));
             });
  module.def("softmax_xent", [](const PyDeviceTensor& log_prob, const PyDeviceTensor& logits,
                                const PyDeviceTensor& targets, float scale,
                                const std::optional<PyDeviceTensor>& grad) {
    py::gil_scoped_release unlocked;
    ops::softmax_xent(log_prob.view, logits.view, targets.view, scale, grad ? &grad->view : nullptr,
                      op_context(common_device(log_prob, logits, targets, grad)));
  });
  module.def("packed_attention",
             [](const PyDeviceTensor& out, const PyDeviceTensor& lse, const PyDeviceTensor& q,
                const PyDeviceTensor& k, const PyDeviceTensor& v, const PyDeviceTensor& cu_seqlens,
                float scale, int64_t window) {
               py::gil_scoped_release unlocked;
               ops::packed_attention(out.view, lse.view, q.view, k.view, v.view, cu_seqlens.view,
                                     {scale, window},
                                     op_context(common_device(out, lse, q, k, v, cu_seqlens)));
             });
  module.def("packed_attention_bwd",
             [](const PyDeviceTensor& dq, const PyDeviceTensor& dk, const PyDeviceTensor& dv,
                const PyDeviceTensor& dout, const PyDeviceTensor& q, const PyDeviceTensor& k,
                const PyDeviceTensor& v, const PyDeviceTensor& out, const PyDeviceTensor& lse,
                const PyDeviceTensor& cu_seqlens, float scale, int64_t window) {
               py::gil_scoped_release unlocked;
               ops::packed_attention_bwd(
                   dq.view, dk.view, dv.view,
                   {dout.view, q.view, k.view, v.view, out.view, lse.view, cu_seqlens.view},
                   {scale, window},
                   op_context(common_device(dq, dk, dv, dout, q, k, v, out, lse, cu_seqlens)));
             });
  module.def("has_matmul", [] { return ops::has_matmul(); });
  module.def("matmul", [](const PyDeviceTensor& out, const PyDeviceTensor& a, bool a_transposed,
                          const PyDeviceTensor& b, bool b_transposed,
                          const std::optional<PyDeviceTensor>& bias, bool add) {
    py::gil_scoped_release unlocked;
    ops::matmul(out.view, a.view, a_transposed, b.view, b_transposed, bias ? &bias->view : nullptr,
                add, op_context(common_device(out, a, b, bias)));
  });
  module.def("linear_xent", [](const PyDeviceTensor& log_prob, const PyDeviceTensor& hidden,
                               const PyDeviceTensor& weight, const PyDeviceTensor& targets,
                               float scale, const std::optional<PyDeviceTensor>& grad,
                               const std::optional<PyDeviceTensor>& dhidden,
                               const std::optional<PyDeviceTensor>& dweight, int64_t chunk_tokens) {
    py::gil_scoped_release unlocked;
    const auto view = [](const std::optional<PyDeviceTensor>& tensor) {
      return tensor ? &tensor->view : nullptr;
    };
    const ops::LinearXentGrads grads{view(grad), view(dhidden), view(dweight)};
    ops::linear_xent(
        log_prob.view, hidden.view, weight.view, targets.view, scale, grad ? &grads : nullptr,
        chunk_tokens,
        op_context(common_device(log_prob, hidden, weight, targets, grad, dhidden, dweight)));
  });
  module.def("squared_norm", [](const PyTensor& x) {
    py::gil_scoped_release unlocked;
    return ops::squared_norm(x.view, op_context());
  });
  module.def("adamw",
             [](const PyDeviceTensor& master, const PyDeviceTensor& mean,
                const PyDeviceTensor& square, const PyDeviceTensor& grad,
                const std::optional<PyDeviceTensor>& parameter, int64_t step, double rate,
                double beta1, double beta2, double eps, double weight_decay, double grad_scale) {
               py::gil_scoped_release unlocked;
               ops::adamw(master.view, mean.view, square.view, grad.view,
                          parameter ? &parameter->view : nullptr,
                          {step, rate, beta1, beta2, eps, weight_decay, grad_scale},
                          op_context(common_device(master, mean, square, grad, parameter)));
             });
  module.def("mlp", [](const PyDeviceTensor& out, const PyDeviceTensor& x, const PyWeight& gate,
                       const PyWeight& up, const PyWeight& down, bool invariant) {
    py::gil_scoped_release unlocked;
    ops::mlp(out.view, x.view, {gate.view, up.view, down.view}, invariant,
             op_context(common_device(out, x, gate, up, down)));
  });
  module.def(
      "gather", [](const PyDeviceTensor& out, const PyDeviceTensor& ids, const PyWeight& table) {
        py::gil_scoped_release unlocked;
        ops::gather(out.view, ids.view, table.view, op_context(common_device(out, ids, table)));
      });
  module.def("argmax", [](const PyTensor& x) {
    py::gil_scoped_release unlocked;
    return ops::argmax(x.view, op_context());
  });
  module.def("log_sum_exp", [](const PyTensor& x) {
    py::gil_scoped_release unlocked;
    return ops::log_sum_exp(x.view, op_context());
  });

  module.def("kv_page_bytes", [](int64_t page_tokens, int64_t num_kv_heads, int64_t head_dim,
                                 const std::string& dtype) {
    return ops::kv_page_bytes(page_tokens, num_kv_heads, head_dim, kv_dtype(dtype));
  });
  module.def("kv_append", [](const PyPages& pages, const PyTensor& k, const PyTensor& v,
                             const std::vector<PySpan>& spans) {
    py::gil_scoped_release unlocked;
    ops::kv_append(kv_layer(pages), k.view, v.view, sequence_spans(spans, pages), op_context());
  });
  module.def("attention", [](const PyTensor& out, const PyTensor& q, const PyPages& pages,
                             const std::vector<PySpan>& spans, float scale, int64_t window,
                             const std::optional<PyTensor>& query_scale) {
    py::gil_scoped_release unlocked;
    if (query_scale) {
      const TensorView& factors = query_scale->view;
      QN_CHECK(factors.dtype == DType::F32 && factors.rank == 1 && factors.contiguous() &&
                   factors.shape[0] == q.view.shape[0],
               "[attention] query_scale is ", factors.describe(), ", expected dense f32[",
               q.view.shape[0], "]");
    }
    const ops::AttentionOptions options{
        scale, window, query_scale ? query_scale->view.as<const float>() : nullptr};
    ops::attention(out.view, q.view, kv_layer(pages), sequence_spans(spans, pages), options,
                   op_context());
  });
}

}  // namespace qn::python
