// Generalised advantage estimation as a scan of affine maps.
//
// Source: Schulman et al. 2015, arXiv:1506.02438, eq. 16: A_t = r_t + gamma V' - V_t + gamma lam
// A', where ' marks the next token that counts. Everything that a token takes from its right is in
// one number, the carry C' = gamma V' + gamma lam A':
//
//   A_t = r_t - V_t + C'
//   C_t = gamma V_t + gamma lam A_t = [gamma (1 - lam) V_t + gamma lam r_t] + gamma lam C'
//
// so a token that counts maps carry to carry by x -> shift + scale x, and one that does not is the
// identity: holes in a mask need no other care. Maps compose, and composition is associative.
#pragma once
#include "hydra/host_device.h"

namespace hydra {

struct GAECoefs {
  float gamma;
  float scale;         // gamma lam
  float value_weight;  // gamma (1 - lam)
};

inline GAECoefs gae_coefs(double gamma, double lam) {
  return {
      static_cast<float>(gamma), static_cast<float>(gamma * lam),
      static_cast<float>(gamma * (1.0 - lam))};
}

struct AffineMap {
  float scale;
  float shift;
};

HYDRA_HOST_DEVICE float apply(AffineMap map, float x) {
  return map.shift + map.scale * x;
}

// `right` first, then `left`: the map of two neighbouring stretches of a row.
HYDRA_HOST_DEVICE AffineMap compose(AffineMap left, AffineMap right) {
  return {left.scale * right.scale, left.shift + left.scale * right.shift};
}

HYDRA_HOST_DEVICE AffineMap gae_map(bool counts, float reward, float value, GAECoefs coefs) {
  return {
      counts ? coefs.scale : 1.0f,
      counts ? coefs.value_weight * value + coefs.scale * reward : 0.0f};
}

// The carry right of the last token that counts; last_value is 0 for a sequence that finished.
HYDRA_HOST_DEVICE float gae_first_carry(float last_value, GAECoefs coefs) {
  return coefs.gamma * last_value;
}

HYDRA_HOST_DEVICE float gae_advantage(float reward, float value, float carry) {
  return (reward - value) + carry;
}

}  // namespace hydra
