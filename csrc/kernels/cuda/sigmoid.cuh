// 1 / (1 + exp(-x)) for SwiGLU and its gradient.
#pragma once
#include "kernels/cuda/ptx.cuh"

namespace qn::cuda {

struct Sigmoid {
  float value;  // of x
  float rest;   // 1 - value, without cancellation
};

/// From exp(-|x|), which cannot overflow; below x = -87 the value is 0. exp2's argument is rounded;
/// the rest of the product, |rest| < 2^-17, makes a factor of 1 + rest ln 2.
QN_DEV Sigmoid sigmoid(float x) {
  constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.693147180559945309417f;
  constexpr float kLog2ELow = 1.925963033500e-8f;  // log2(e) - kLog2E
  const float size = fminf(fabsf(x), 256.0f), exponent = size * -kLog2E;
  const float rest = fmaf(size, -kLog2ELow, fmaf(size, -kLog2E, -exponent));
  const float rounded = exp2_approx(exponent), e = fmaf(rounded, rest * kLn2, rounded);
  const float large = rcp_approx(1.0f + e), small = e * large;
  return x < 0.0f ? Sigmoid{small, large} : Sigmoid{large, small};
}

QN_DEV float silu(float x) { return x * sigmoid(x).value; }

}  // namespace qn::cuda
