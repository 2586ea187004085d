#pragma once
// What a step of signs over two phases must give, in plain loops over all ranks at once (specs: 1-bit Adam, compressed all-reduce). Shares
// no code with the library; only the words of its public structs.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "compressors/core/dtype.hpp"
#include "tests/reducer_oracle.hpp"

namespace thinwire::test {

struct TwoPhaseOracle {
  using Arrays = std::vector<std::vector<float>>;  // per parameter

  struct Options {
    bool feedback = true;
    float decay = 1;
    bool averaged = false;
    float beta1 = 0.9f;
    int freeze = 0;         ///< averaged: steps that stay dense first
    std::size_t block = 8;  ///< 0: one scale per part
    bool l2 = false;
    double clip_norm = 0;  ///< of local gradients; fp32 only
    DType dtype = DType::fp32;
  };

  int world;
  std::vector<std::size_t> numel;
  std::vector<bool> compressed;
  Options options;
  std::vector<Arrays> residual;  ///< [rank][parameter]
  Arrays server, momentum;       ///< of whole parameters: every owner's part
  std::vector<std::vector<bool>> dead;

  TwoPhaseOracle(int w, std::vector<std::size_t> n, std::vector<bool> c, Options o)
      : world(w), numel(std::move(n)), compressed(std::move(c)), options(o), dead(numel.size()) {
    Arrays zero;
    for (const std::size_t count : numel) zero.emplace_back(count, 0.0f);
    residual.assign(std::size_t(world), zero);
    server = momentum = zero;
  }

  std::size_t part_length(std::size_t n) const { return (n + 8 * std::size_t(world) - 1) / (8 * std::size_t(world)) * 8; }
  bool is_dead(std::size_t p, std::size_t i) const { return !dead[p].empty() && dead[p][i]; }

  float scale_of(const float* x, std::size_t p, std::size_t first, std::size_t n) const {
    std::vector<double> over(64, 0.0);
    std::size_t live = 0;
    double single = 0;
    for (std::size_t b = 0; b * 4096 < n; ++b) {
      float partial[64] = {};
      for (std::size_t i = b * 4096; i < std::min(n, (b + 1) * 4096); ++i) {
        if (is_dead(p, first + i)) continue;
        ++live;
        partial[i % 64] += options.l2 ? x[i] * x[i] : std::fabs(x[i]);
      }
      for (int width = 32; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) partial[i] += partial[i + width];
      over[b % 64] += single = partial[0];
    }
    if (live == 0) return 0;
    if (n > 4096) {
      for (int width = 32; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) over[std::size_t(i)] += over[std::size_t(i + width)];
      single = over[0];
    }
    return float(options.l2 ? std::sqrt(single / double(live)) : single / double(live));
  }

  /// sent[i] = ±scale of its block; x becomes what stays. `first`: of the parameter.
  void encode(std::vector<float>& x, std::vector<float>& sent, std::size_t p, std::size_t first, bool owner) const {
    const std::size_t block = options.block == 0 ? std::max<std::size_t>(x.size(), 1) : options.block;
    for (std::size_t from = 0; from < x.size(); from += block) {
      const std::size_t n = std::min(block, x.size() - from);
      float scale = scale_of(&x[from], p, first + from, n);
      if (owner) scale = as_wire(scale, options.dtype);
      for (std::size_t i = from; i < from + n; ++i) {
        sent[i] = is_dead(p, first + i) ? 0 : x[i] < 0 ? -scale : scale;
        if (!is_dead(p, first + i)) x[i] -= sent[i];
      }
    }
  }

  struct Step {
    std::vector<Arrays> grad;  ///< [rank][parameter]
    std::vector<std::vector<std::uint32_t>> buckets;
    bool flush = false;
  };

  /// The local gradients, at most c·sqrt(N·n_p/n_total) long.
  Step clipped(Step s) const {
    if (options.clip_norm == 0) return s;
    double total = 0;
    for (const std::size_t n : numel) total += double(n);
    for (Arrays& grads : s.grad)
      for (std::size_t p = 0; p < numel.size(); ++p) {
        double squares = 0;
        for (const float g : grads[p]) squares += std::isfinite(g) ? double(g) * g : 0;
        const double limit = options.clip_norm * std::sqrt(world * double(numel[p]) / total), norm = std::sqrt(squares);
        if (norm > limit)
          for (float& g : grads[p]) g *= float(limit / norm);
      }
    return s;
  }

  /// @returns every parameter's output.
  Arrays run(int step, const Step& raw) {
    const Step s = clipped(raw);
    Arrays out(numel.size());
    const bool frozen = !options.averaged || step >= options.freeze;
    for (const auto& bucket : s.buckets) {
      bool bad = false;
      for (const std::uint32_t p : bucket)
        for (int r = 0; r < world; ++r)
          for (const float g : s.grad[std::size_t(r)][p]) bad |= !std::isfinite(g);
      for (const std::uint32_t p : bucket) {
        if (!compressed[p]) {
          out[p] = dense_mean(s, p);
        } else if (!frozen) {
          out[p] = dense_mean(s, p);
          for (std::size_t i = 0; i < numel[p] && !bad; ++i)
            momentum[p][i] = options.beta1 * momentum[p][i] + (1.0f - options.beta1) * mean_of(s, p, i);
        } else {
          out[p] = two_phases(s, p, bad);
        }
        if (bad) std::fill(out[p].begin(), out[p].end(), NAN);
      }
    }
    return out;
  }

  std::vector<float> dense_mean(const Step& s, std::uint32_t p) const {
    std::vector<float> out(numel[p]);
    for (std::size_t i = 0; i < numel[p]; ++i) out[i] = as_type(mean_of(s, p, i), options.dtype);
    return out;
  }

  float mean_of(const Step& s, std::uint32_t p, std::size_t i) const {
    float sum = 0;
    for (int r = 0; r < world; ++r) sum += s.grad[std::size_t(r)][p][i];
    return sum * (1.0f / float(world));
  }

  std::vector<float> two_phases(const Step& s, std::uint32_t p, bool bad) {
    const std::size_t n = numel[p], length = part_length(n);
    std::vector<float> out(n), next = momentum[p];
    for (int owner = 0; owner < world; ++owner) {
      const std::size_t first = std::min(n, std::size_t(owner) * length), count = std::min(length, n - first);
      Arrays sent;
      sent.assign(std::size_t(world), std::vector<float>(count, 0.0f));
      for (int r = 0; r < world; ++r) {
        std::vector<float> x(count);
        for (std::size_t i = 0; i < count; ++i) {
          const float raw = s.grad[std::size_t(r)][p][first + i], g = std::isfinite(raw) ? raw : 0.0f;
          x[i] = options.averaged ? options.beta1 * momentum[p][first + i] + (1.0f - options.beta1) * g : g;
          if (options.feedback) x[i] = options.decay * residual[std::size_t(r)][p][first + i] + x[i];
        }
        encode(x, sent[std::size_t(r)], p, first, false);
        for (std::size_t i = 0; i < count && options.feedback; ++i)
          if (!is_dead(p, first + i)) residual[std::size_t(r)][p][first + i] = x[i];
      }
      std::vector<float> mean(count), sign(count);
      for (std::size_t i = 0; i < count; ++i) {
        float sum = 0;
        for (std::size_t r = 0; r < std::size_t(world); r += 2) {
          const float pair = r + 1 < std::size_t(world) ? sent[r][i] + sent[r + 1][i] : sent[r][i];
          sum = r == 0 ? pair : sum + pair;
        }
        mean[i] = is_dead(p, first + i) ? 0 : 1.0f * server[p][first + i] + sum * (1.0f / float(world));
      }
      encode(mean, sign, p, first, true);
      for (std::size_t i = 0; i < count; ++i) {
        if (!is_dead(p, first + i)) server[p][first + i] = mean[i];
        out[first + i] = as_type(sign[i], options.dtype);
        next[first + i] = sign[i];
        if (!bad || is_dead(p, first + i)) continue;
        server[p][first + i] += sign[i];
        if (options.averaged) server[p][first + i] -= options.beta1 * momentum[p][first + i];
      }
    }
    if (!bad && options.averaged) momentum[p] = next;
    return out;
  }
};

}  // namespace thinwire::test
