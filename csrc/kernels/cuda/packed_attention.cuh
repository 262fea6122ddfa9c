// What training's attention and its gradients share: documents packed one after the other, and the
// copies of their rows to shared memory. A query row is one head of one token: row r of a document
// and kv head is token r / group, head r % group of the group.
#pragma once
#include "kernels/cuda/attention.cuh"

namespace qn::cuda {

/// One document as a block sees it, for one kv head. Nobody has checked `begins`: what lies outside
/// the tokens is cut off.
struct Document {
  int first_token, length, kv_head, group;

  QN_DEV Document(const DocumentAttentionArgs& args, int document, int kv_head_index)
      : first_token(within(args.begins[document], 0, args.tokens)),
        length(within(args.begins[document + 1], first_token, args.tokens) - first_token),
        kv_head(kv_head_index),
        group(args.num_heads / args.num_kv_heads) {}

  QN_DEV static int within(int value, int low, int64_t high) {
    return value < low ? low : value < high ? value : static_cast<int>(high);
  }

  QN_DEV int rows() const { return length * group; }

  /// Where a query row begins in a tensor [tokens, num_heads, HeadDim].
  template <int HeadDim>
  QN_DEV int64_t query_offset(int64_t token_stride, int row) const {
    return (first_token + row / group) * token_stride + (kv_head * group + row % group) * HeadDim;
  }
  /// Where a key begins in a tensor [tokens, num_kv_heads, HeadDim].
  template <int HeadDim>
  QN_DEV int64_t key_offset(int64_t token_stride, int key) const {
    return (first_token + key) * token_stride + kv_head * HeadDim;
  }
  /// Of a query row in a tensor [num_heads, tokens].
  QN_DEV int64_t statistic_offset(int64_t tokens, int row) const {
    return (kv_head * group + row % group) * tokens + first_token + row / group;
  }
};

/// Starts the copies of `Rows` rows, row i from `from` + offset(i); from `limit` on they are zeros.
template <int HeadDim, int Rows, int Threads, class Offset>
QN_DEV void copy_tile(bf16 (*to)[HeadDim + 8], const void* from, int limit, const Offset& offset) {
  const bf16* const base = static_cast<const bf16*>(from);
  for_chunks<Rows, HeadDim / 8, Threads>(threadIdx.x, [&](int row, int chunk) {
    const bool exists = row < limit;
    cp_async16(&to[row][chunk * 8], exists ? base + offset(row) + chunk * 8 : base, exists);
  });
}

/// Calls Run<head_dim>::run(...).
template <template <int> class Run, class... Args>
int for_head_dim(int head_dim, const Args&... args) {
  switch (head_dim) {
    case 64:
      return Run<64>::run(args...);
    case 80:
      return Run<80>::run(args...);
    case 96:
      return Run<96>::run(args...);
    default:
      return Run<128>::run(args...);
  }
}

}  // namespace qn::cuda
