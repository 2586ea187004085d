#pragma once
// What a step must give, in plain loops over all ranks at once: recursions none, EF14 and DGC, exact top-k, means in rank order, dense
// tensors and steps, and the rule for non-finite gradients. Shares no code with the library; only the words of its public structs.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "compressors/core/dtype.hpp"

namespace thinwire::test {

/// Round to nearest even to `precision` significant bits, units no finer than 2^least. In doubles, so exact before the one rounding.
inline float round_to(float x, int precision, int least) {
  if (x == 0 || !std::isfinite(x)) return x;
  int exponent;
  std::frexp(x, &exponent);
  const int unit = std::max(exponent - precision, least);
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(double(x), -unit)), unit);
  return float(rounded);
}
/// As an element of this type; beyond its range: infinity.
inline float as_type(float x, DType dtype) {
  if (dtype == DType::bf16) return round_to(x, 8, -133);
  if (dtype == DType::fp16) {
    const float y = round_to(x, 11, -24);
    return std::abs(y) > 65504.0f ? std::copysign(std::numeric_limits<float>::infinity(), y) : y;
  }
  return x;
}
/// As a value on the wire: cut to the largest finite one.
inline float as_wire(float x, DType wire) {
  const float most = wire == DType::fp16 ? 65504.0f : wire == DType::bf16 ? 0x1.fep127f : std::numeric_limits<float>::max();
  const float y = as_type(x, wire);
  return std::abs(y) > most ? std::copysign(most, y) : y;
}

class Oracle {
 public:
  enum class Feedback { none, ef14, dgc };
  enum class Way { never, dense, sparse };  ///< never compressed; dense at this step; compressed
  using Entries = std::vector<std::pair<std::size_t, float>>;
  using Arrays = std::vector<std::vector<float>>;  // per parameter

  struct Options {
    Feedback feedback = Feedback::none;
    float rate = 1.0f;  ///< decay or momentum
    bool nesterov = false, mask = true;
    double clip_norm = 0;
    DType wire = DType::fp32, dtype = DType::fp32;
    bool step_verdict = false;
  };
  struct Step {
    std::vector<Arrays> grad = {};  ///< [rank][parameter]
    std::vector<Way> way = {};
    std::vector<std::size_t> k = {};
    std::vector<std::vector<std::uint32_t>> buckets;
    std::vector<bool> joined = {};  ///< per rank; empty: nobody
    float scale = 1.0f;             ///< the grad scaler's
    /// What (rank, parameter) sends, where that is not for the oracle to choose (a sampled selection); null: exact top-k.
    std::function<Entries(int rank, std::uint32_t parameter)> sent = nullptr;
  };

  Oracle(int world, std::vector<std::size_t> numel, const Options& options) : world_(world), numel_(std::move(numel)), options_(options) {
    Arrays zero;
    for (const std::size_t n : numel_) zero.emplace_back(n, 0.0f);
    u_.assign(std::size_t(world), zero);
    v_ = u_;
  }

  /// The means, the same for all ranks.
  Arrays step(const Step& s) {
    Arrays mean(numel_.size());
    std::vector<Settlement> settlements;
    bool step_good = true;
    for (const auto& bucket : s.buckets) {
      bool good = true;
      Settlement back;
      for (const std::uint32_t p : bucket) {
        std::vector<float> sum(numel_[p], 0.0f);
        for (int r = 0; r < world_; ++r) {
          if (!s.joined.empty() && s.joined[std::size_t(r)]) continue;
          const std::vector<float> sends = send(s, r, p, good, back);
          for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += sends[i];
        }
        // A gradient without state and codec never leaves the scaler's units.
        const bool scaled = s.way[p] == Way::sparse || options_.feedback == Feedback::dgc || (s.way[p] == Way::dense);
        const float factor = 1.0f / float(world_) * (scaled ? s.scale : 1.0f);
        for (float& x : sum) {
          x = as_type(x * factor, options_.dtype);
          good = good && std::isfinite(x);
        }
        mean[p] = sum;
      }
      if (!good) {
        for (const std::uint32_t p : bucket) mean[p].assign(numel_[p], std::numeric_limits<float>::quiet_NaN());
        step_good = false;
      }
      if (options_.step_verdict) {
        settlements.push_back(std::move(back));
      } else {
        settle(back, good);
      }
    }
    for (const Settlement& back : settlements) settle(back, step_good);
    if (options_.step_verdict) {
      started_ = started_ || step_good;
      if (!started_)
        for (auto* state : {&u_, &v_})
          for (Arrays& rank : *state)
            for (auto& array : rank) std::fill(array.begin(), array.end(), 0.0f);
    }
    bad_steps_ += step_good ? 0 : 1;
    return mean;
  }

  const std::vector<float>& momentum(int r, std::uint32_t p) const { return u_[std::size_t(r)][p]; }
  const std::vector<float>& residual(int r, std::uint32_t p) const { return v_[std::size_t(r)][p]; }
  int bad_steps() const { return bad_steps_; }

  /// The k largest magnitudes of what a receiver would decode, ties to the lowest index, never a zero; in index order.
  static Entries top_k(const std::vector<float>& x, std::size_t k, DType wire) {
    std::vector<std::size_t> order;
    for (std::size_t i = 0; i < x.size(); ++i)
      if (as_wire(x[i], wire) != 0) order.push_back(i);
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return std::abs(x[a]) > std::abs(x[b]); });
    order.resize(std::min(k, order.size()));
    std::sort(order.begin(), order.end());
    Entries out;
    for (const std::size_t i : order) out.emplace_back(i, as_wire(x[i], wire));
    return out;
  }

 private:
  struct Settlement {
    struct Sent {
      int rank;
      std::uint32_t parameter;
      Entries entries;
    };
    std::vector<Sent> sent;                            // returns on a bad verdict
    std::vector<std::pair<int, std::uint32_t>> empty;  // residuals to empty on a good one
  };

  float clip(const Step& s, int r, std::uint32_t p) const {
    const double unscale = 1.0 / double(s.scale);
    if (options_.clip_norm == 0) return float(unscale);
    double total = 0, squares = 0;
    for (const std::size_t n : numel_) total += double(n);
    for (const float x : s.grad[std::size_t(r)][p])
      if (std::isfinite(x)) squares += double(x) * unscale * double(x) * unscale;
    const double limit = options_.clip_norm * std::sqrt(world_ * double(numel_[p]) / total), norm = std::sqrt(squares);
    return norm > limit ? float(unscale * limit / norm) : float(unscale);
  }

  std::vector<float> send(const Step& s, int r, std::uint32_t p, bool& good, Settlement& back) {
    const std::vector<float>& grad = s.grad[std::size_t(r)][p];
    std::vector<float>&u = u_[std::size_t(r)][p], &v = v_[std::size_t(r)][p];
    const bool never = s.way[p] == Way::never;
    const bool plain = never && options_.feedback != Feedback::dgc;
    const float factor = plain ? 1.0f : clip(s, r, p);
    std::vector<float> x(grad.size());
    for (std::size_t i = 0; i < x.size(); ++i) {
      float g = grad[i] * factor;
      if (!std::isfinite(g)) g = 0, good = false;
      float u1 = u[i], message;
      if (plain || options_.feedback == Feedback::none) {
        message = g;
      } else if (options_.feedback == Feedback::ef14) {
        const float kept = options_.rate * v[i];
        message = kept + g;
      } else if (options_.nesterov) {
        const float both = u[i] + g;
        u1 = options_.rate * both;
        message = (never ? 0.0f : v[i]) + (u1 + g);
      } else {
        const float kept = options_.rate * u[i];
        u1 = kept + g;
        message = (never ? 0.0f : v[i]) + u1;
      }
      x[i] = message;
      if (options_.feedback == Feedback::dgc) u[i] = u1;
      if (!never && options_.feedback != Feedback::none) v[i] = message;
    }
    if (s.way[p] == Way::dense) back.empty.emplace_back(r, p);
    if (s.way[p] != Way::sparse) return x;

    const Entries entries = s.sent ? s.sent(r, p) : top_k(x, s.k[p], options_.wire);
    std::vector<float> decoded(x.size(), 0.0f);
    for (const auto& [i, value] : entries) {
      decoded[i] = value;
      if (options_.feedback != Feedback::none) v[i] = x[i] - value;
      if (options_.feedback == Feedback::dgc && options_.mask) u[i] = 0;
    }
    back.sent.push_back({r, p, entries});
    return decoded;
  }

  void settle(const Settlement& back, bool good) {
    if (good) {
      for (const auto& [r, p] : back.empty) std::fill(v_[std::size_t(r)][p].begin(), v_[std::size_t(r)][p].end(), 0.0f);
    } else if (options_.feedback != Feedback::none) {
      for (const auto& sent : back.sent)
        for (const auto& [i, value] : sent.entries) v_[std::size_t(sent.rank)][sent.parameter][i] += value;
    }
  }

  int world_;
  std::vector<std::size_t> numel_;
  Options options_;
  std::vector<Arrays> u_, v_;  // [rank][parameter]
  bool started_ = false;
  int bad_steps_ = 0;
};

}  // namespace thinwire::test
