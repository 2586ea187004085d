// What a reducer's state is outside of it: checkpoints, of this world size or another, and the mean of estimates made anew between steps.
#include <algorithm>
#include <array>
#include <cmath>
#include <set>

#include "collectives/reducer_impl.hpp"
#include "compressors/core/error.hpp"
#include "compressors/core/wire.hpp"

namespace thinwire {

namespace {

constexpr std::string_view kServerResidual = "server_residual", kEstimate = "estimate", kMeanEstimate = "mean_estimate";

}  // namespace

std::size_t GradientReducer::Impl::length_in(const Array& array, std::uint32_t id, const ReducerState& source) const {
  return array.name == kServerResidual ? owned_part(slots_[id].numel, source.world, source.rank).count : array.count;
}

bool GradientReducer::Impl::off_grid(const Array& array, std::span<const float> values) const noexcept {
  return recursion_.grid && array.name == kEstimate &&
         !std::all_of(values.begin(), values.end(), [](float x) { return (float_bits(x) & 0xffffu) == 0; });
}

std::size_t GradientReducer::Impl::arrays_of(std::uint32_t id, std::span<Array> out) const {
  const ParameterSlot& slot = slots_[id];
  const auto names = slot.compressible ? state_names(recursion_) : dense_state_names(recursion_);
  std::size_t n = 0;
  for (std::size_t j = 0; j < names.size(); ++j)
    if (slot.state.array[j]) out[n++] = {names[j], slot.state.array[j], slot.numel};
  if (slot.memory_count != 0) out[n++] = {codec_->memory_name(), slot.state.memory, slot.memory_count};
  if (slot.server_residual != nullptr) out[n++] = {kServerResidual, slot.server_residual, slot.owned.count};
  return n;
}

void GradientReducer::Impl::resynchronize() {
  const std::lock_guard lock(submit_);
  between_steps("resynchronize()");
  finish_all();
  // On the caller's communicator, as load_state(): a peer that has gone on with its next step is at the reducer's own.
  const Deadline deadline(*parent_, communicator_->timeout());
  compare_with_all("resynchronize()", {step_, freeze_at_, false, false});

  constexpr std::size_t kPiece = std::size_t(1) << 16;
  const std::size_t world = std::size_t(parent_->size()), rank = std::size_t(parent_->rank());
  std::vector<double> pieces(kPiece * world);
  std::vector<float> mean, estimate, held_back;
  double moved = 0, all = 0;
  std::array<Array, kNamedArrays> arrays;
  for (std::uint32_t p = 0; p < slots_.size(); ++p) {
    const ParameterSlot& slot = slots_[p];
    const std::span<const Array> kept = std::span(arrays).first(arrays_of(p, arrays));
    const auto shared = std::find_if(kept.begin(), kept.end(), [](const Array& array) { return array.name == kMeanEstimate; });
    if (shared == kept.end()) continue;
    const auto read = [&](StateArray array, std::size_t count, std::vector<float>& into) {
      into.resize(count);
      arena_.read(array, into);
    };
    read(shared->data, slot.numel, mean);
    read(estimate_of(recursion_, slot.state), slot.numel, estimate);
    read(slot.server_residual, slot.server_residual != nullptr ? slot.owned.count : 0, held_back);
    for (std::size_t first = 0; first < slot.numel; first += kPiece) {
      const std::size_t count = std::min(kPiece, slot.numel - first);
      double* const own = pieces.data() + rank * count;
      for (std::size_t i = 0; i < count; ++i) own[i] = estimate[first + i];
      for (std::size_t i = 0; i < held_back.size(); ++i) {  // H and what the owner holds back make the mean
        const std::size_t at = slot.owned.first + i;
        if (at >= first && at < first + count) own[at - first] -= double(world) * held_back[i];
      }
      const Bytes gathered{reinterpret_cast<std::byte*>(pieces.data()), world * count * sizeof(double), DType::u8, Place::host, 0};
      parent_->all_gather(gathered.sub(rank * count * sizeof(double), count * sizeof(double)), gathered);
      for (std::size_t i = 0; i < count; ++i) {
        double sum = 0;
        for (std::size_t r = 0; r < world; ++r) sum += pieces[r * count + i];
        sum /= double(world);
        moved += (sum - mean[first + i]) * (sum - mean[first + i]);
        all += sum * sum;
        mean[first + i] = float(sum);
      }
    }
    arena_.write(mean, shared->data);
  }
  if (recursion_.kind != Recursion::Kind::estimate) return;
  const std::lock_guard counters(counters_);
  resync_error_ = all > 0 ? std::sqrt(moved / all) : 0.0;
}

void GradientReducer::Impl::reorder(std::uint32_t id, std::span<const std::uint32_t> from) {
  const std::lock_guard lock(submit_);
  if (closed_) fail(Errc::invalid_argument, "reorder() after close()");
  if (id >= slots_.size())
    fail(Errc::invalid_argument, "reorder(): there is no parameter " + std::to_string(id) + ", only " + std::to_string(slots_.size()));
  ParameterSlot& slot = slots_[id];
  const std::string whose = "reorder(): parameter '" + slot.parameter.name + "' ";
  std::vector<bool> taken(slot.numel);
  for (const std::uint32_t at : from) {
    if (from.size() != slot.numel || at >= slot.numel || taken[at])
      fail(Errc::invalid_argument, whose + "has " + std::to_string(slot.numel) + " elements, of which a permutation is needed");
    taken[at] = true;
  }
  if (seen_[id] > step_) fail(Errc::invalid_argument, whose + "was reduced in step " + std::to_string(step_) + " already");
  finish_all();

  std::array<Array, kNamedArrays> arrays;
  const std::span<const Array> kept = std::span(arrays).first(arrays_of(id, arrays));
  std::vector<float> before, after(slot.numel);
  const auto read = [&](const Array& array) {
    before.resize(array.count);
    arena_.read(array.data, before);
  };
  for (const Array& array : kept) {
    if (array.name != kServerResidual) continue;
    read(array);
    if (std::any_of(before.begin(), before.end(), [](float x) { return x != 0; }))
      fail(Errc::invalid_argument, whose +
                                       "lies otherwise in memory than before, but its owners hold back parts of it by their places; "
                                       "give it its memory format before the first compressed step");
  }
  for (const Array& array : kept) {
    if (array.name == kServerResidual || array.count != slot.numel || array.data == StateArray(slot.state.memory)) continue;
    read(array);
    for (std::size_t i = 0; i < from.size(); ++i) after[i] = before[from[i]];
    arena_.write(after, array.data);
  }
  if (slot.live.empty()) return;
  std::vector<std::uint8_t> live(slot.live.size());
  for (std::size_t i = 0; i < from.size(); ++i)
    if (is_live(slot.live.data(), from[i])) live[i / 8] = std::uint8_t(live[i / 8] | 1u << (i % 8));
  slot.live = std::move(live);
  plans_.clear();  // they point to the masks
}

ReducerState GradientReducer::Impl::state() const {
  const std::lock_guard lock(submit_);
  between_steps("state()");
  finish_all();
  ReducerState out;
  out.step = step_;
  out.world = communicator_->size();
  out.rank = communicator_->rank();
  out.config = config_.str();
  out.started = engine_->started();
  out.nonfinite_steps = engine_->nonfinite_steps();
  if (recursion_.averaged && freeze_at_ != UINT64_MAX) out.frozen = freeze_at_;
  out.flush = flush_next_ || has_flush_failed();
  if (recursion_.kind == Recursion::Kind::estimate) {
    if (const std::uint64_t until = start_goes_on_until(); until > step_) out.start_until = until;
    for (const ParameterSlot& slot : slots_)
      if (slot.dense_now) out.dense[slot.parameter.name] = slot.dtype;
  }
  std::array<Array, kNamedArrays> arrays;
  for (std::uint32_t p = 0; p < slots_.size(); ++p) {
    auto& named = out.parameters[slots_[p].parameter.name];
    for (std::size_t a = 0, n = arrays_of(p, arrays); a < n; ++a) {
      std::vector<float>& values = named[std::string(arrays[a].name)];
      values.resize(arrays[a].count);
      arena_.read(arrays[a].data, values);
    }
    const Watch* const watch = recursion_.control ? engine_->watch() : nullptr;
    const WatchdogState* const watchdog = watch != nullptr ? watch->state(p) : nullptr;
    if (watchdog != nullptr) out.watchdog[slots_[p].parameter.name] = *watchdog;
  }
  return out;
}

namespace {

const ReducerState& checked_front(std::span<const ReducerState> states, int world, int rank) {
  if (states.empty()) fail(Errc::invalid_argument, "load_state: no state was given");
  for (const ReducerState& s : states) {
    if (s.world != states.front().world || s.step != states.front().step)
      fail(Errc::invalid_argument, "load_state: the states are not of one checkpoint: rank " + std::to_string(s.rank) + " is of world " +
                                       std::to_string(s.world) + " at step " + std::to_string(s.step) + ", rank " +
                                       std::to_string(states.front().rank) + " of world " + std::to_string(states.front().world) +
                                       " at step " + std::to_string(states.front().step));
  }
  const int old_world = states.front().world;
  if (states.size() == 1 && old_world == world) {
    if (states.front().rank != rank)
      fail(Errc::invalid_argument, "load_state: this is rank " + std::to_string(rank) + ", the state is rank " +
                                       std::to_string(states.front().rank) + "'s; every rank loads its own, or the sequence of all");
    return states.front();
  }
  if (states.size() != std::size_t(old_world))
    fail(Errc::invalid_argument, "load_state: " + std::to_string(states.size()) + " state(s) of a world of " + std::to_string(old_world) +
                                     " were given to a world of " + std::to_string(world) +
                                     "; another world size needs the states of all " + std::to_string(old_world) + " old ranks");
  for (std::size_t r = 0; r < states.size(); ++r) {
    if (states[r].rank != int(r))
      fail(Errc::invalid_argument, "load_state: state " + std::to_string(r) + " of the sequence is rank " + std::to_string(states[r].rank) +
                                       "'s; give them in rank order");
  }
  return old_world == world ? states[std::size_t(rank)] : states.front();
}

/// What is wrong with a state: the first findings in words, and how many more there are, since another config differs in every parameter.
struct Problems {
  static constexpr std::size_t kShown = 8;
  std::string text;
  std::size_t found = 0;

  void add(const std::string& problem) {
    if (found++ < kShown) text += "; " + problem;
  }
  std::string str() const { return found > kShown ? text + "; and " + std::to_string(found - kShown) + " more" : text; }
};

}  // namespace

std::span<const ReducerState> GradientReducer::Impl::check_states(std::span<const ReducerState> states) const {
  const int world = communicator_->size(), rank = communicator_->rank();
  const ReducerState& front = checked_front(states, world, rank);
  // The same world: this rank's own arrays. Another one: the mean over the old ranks, because the mean is what the output divides by.
  const std::span<const ReducerState> sources = front.world == world ? std::span(&front, 1) : states;

  Problems problems;
  std::set<std::string_view> mine;
  for (const ParameterSlot& slot : slots_) mine.insert(slot.parameter.name);
  std::array<Array, kNamedArrays> arrays;
  std::vector<const std::vector<float>*> first_shared(slots_.size(), nullptr);  // the first state's mean estimates
  for (const ReducerState& source : sources) {
    for (std::uint32_t p = 0; p < slots_.size(); ++p) {
      const std::string& name = slots_[p].parameter.name;
      const auto found = source.parameters.find(name);
      if (found == source.parameters.end()) {
        problems.add("'" + name + "' is missing");
        continue;
      }
      const std::size_t n = arrays_of(p, arrays);
      for (std::size_t a = 0; a < n; ++a) {
        const auto values = found->second.find(std::string(arrays[a].name));
        const std::vector<float>* first_mean_estimate = nullptr;
        if (arrays[a].name == kMeanEstimate && values != found->second.end()) {
          if (&source == &sources.front()) first_shared[p] = &values->second;
          first_mean_estimate = first_shared[p];
        }
        if (values == found->second.end()) {
          problems.add("'" + name + "' has no '" + std::string(arrays[a].name) + "'");
        } else if (const std::size_t length = length_in(arrays[a], p, source); values->second.size() != length) {
          problems.add("'" + name + "' '" + std::string(arrays[a].name) + "' has " + std::to_string(values->second.size()) +
                       " elements instead of " + std::to_string(length));
        } else if (!std::all_of(values->second.begin(), values->second.end(), [](float x) { return is_finite(x); })) {
          problems.add("'" + name + "' '" + std::string(arrays[a].name) + "' holds a value that is not finite");
        } else if (first_mean_estimate != nullptr && values->second != *first_mean_estimate) {
          problems.add("'" + name + "' 'mean_estimate' is not the same on rank " + std::to_string(source.rank) + " and on rank " +
                       std::to_string(sources.front().rank) + ", as it is on all ranks of a checkpoint");
        } else if (sources.size() == 1 && off_grid(arrays[a], values->second)) {
          problems.add("'" + name +
                       "' 'estimate' holds values that are no bf16 numbers, which estimate=grid needs: it was saved with estimate=fp32");
        }
      }
      for (const auto& [array, ignored] : found->second) {
        const bool kept =
            std::any_of(arrays.begin(), arrays.begin() + std::ptrdiff_t(n), [&](const Array& own) { return own.name == array; });
        if (!kept) problems.add("'" + name + "' has '" + array + "', which this config does not keep");
      }
    }
    for (const auto& [name, ignored] : source.parameters)
      if (!mine.contains(name)) problems.add("'" + name + "' is not a parameter here");
    for (const auto& [name, ignored] : source.watchdog)
      if (!mine.contains(name)) problems.add("'" + name + "' in 'watchdog' is not a parameter here");
    for (const auto& [name, ignored] : source.dense)
      if (!mine.contains(name)) problems.add("'" + name + "' in 'dense' is not a parameter here");
  }
  if (!problems.text.empty()) {
    const std::string saved = front.config.empty() || front.config == config_.str() ? "" : ", saved under '" + front.config + "',";
    fail(Errc::invalid_argument, "load_state: the state" + saved + " does not fit config '" + config_.str() + "'" + problems.str());
  }
  return sources;
}

void GradientReducer::Impl::compare_with_all(const char* call, const Standing& standing) const {
  try {
    compare_cards(*parent_, standing, "");
  } catch (const Error& error) {
    if (!is_of_transport(error.code())) throw;
    fail(error.code(), std::string(call) + " at step " + std::to_string(step_) + " on rank " + std::to_string(parent_->rank()) +
                           ", which all ranks have to call: " + error.what());
  }
}

void GradientReducer::Impl::load_state(std::span<const ReducerState> states, const std::string& refused) {
  const std::lock_guard lock(submit_);
  between_steps("load_state()");
  finish_all();

  // First everything is checked, on all ranks, then everything is written. On the caller's communicator: peers that do not load are at the
  // reducer's own, where a message of another size would be taken for a payload.
  const Deadline deadline(*parent_, communicator_->timeout());
  std::span<const ReducerState> sources;
  try {
    if (!refused.empty()) fail(Errc::invalid_argument, refused);
    sources = check_states(states);
  } catch (const Error& error) {
    try {
      compare_cards(*parent_, {step_, freeze_at_, false, false}, error.what());
    } catch (const Error&) {
      // So the others heard of it, or are not there to; this rank's own reason is the one to give.
    }
    throw;
  }
  const ReducerState& front = sources.front();
  // With an optimizer that has yet to decide, the step at which a config would have frozen is none.
  const bool undecided = options_.momentum_elsewhere && front.frozen.value_or(UINT64_MAX) > front.step;
  std::uint64_t freeze_at = UINT64_MAX;
  if (recursion_.averaged && !undecided) freeze_at = front.frozen ? *front.frozen : config_.target().integer("freeze");
  std::uint64_t loaded = front.flush ? 1 : 0;
  for (const ParameterSlot& slot : slots_) {
    const auto& kept = front.parameters.at(slot.parameter.name);
    if (const auto shared = kept.find(std::string(kMeanEstimate)); shared != kept.end())
      loaded = wire::hash_bytes(shared->second.data(), shared->second.size() * sizeof(float), loaded);
  }
  compare_with_all("load_state()", {front.step, freeze_at, false, false, loaded});

  std::array<Array, kNamedArrays> arrays;
  std::vector<float> cut;  // what estimate=grid cuts off the mean of other ranks' estimates: H loses it too, so the next message has it
  for (std::uint32_t p = 0; p < slots_.size(); ++p) {
    const std::size_t n = arrays_of(p, arrays);
    cut.clear();
    for (std::size_t a = 0; a < n; ++a) {
      const std::string key(arrays[a].name);
      if (sources.size() == 1) {  // to the bit, signs of zeros too
        arena_.write(front.parameters.at(slots_[p].parameter.name).at(key), arrays[a].data);
        continue;
      }
      if (arrays[a].name == kServerResidual) {  // the old owners' parts make the whole, of which this rank owns another part
        std::vector<float> whole;
        for (const ReducerState& source : sources) {
          const std::vector<float>& part = source.parameters.at(slots_[p].parameter.name).at(key);
          whole.insert(whole.end(), part.begin(), part.end());
        }
        arena_.write(std::span(whole).subspan(slots_[p].owned.first, slots_[p].owned.count), arrays[a].data);
        continue;
      }
      if (arrays[a].name == kMeanEstimate) {  // all ranks hold the same
        std::vector<float> shared = front.parameters.at(slots_[p].parameter.name).at(key);
        for (std::size_t i = 0; i < cut.size(); ++i) shared[i] -= cut[i];
        arena_.write(shared, arrays[a].data);
        continue;
      }
      std::vector<float> mean(arrays[a].count);
      for (std::size_t i = 0; i < arrays[a].count; ++i) {
        double sum = 0;
        for (const ReducerState& source : sources) sum += source.parameters.at(slots_[p].parameter.name).at(key)[i];
        mean[i] = float(sum / double(sources.size()));
      }
      if (recursion_.grid && arrays[a].name == kEstimate) {
        cut = mean;
        for (std::size_t i = 0; i < mean.size(); ++i) cut[i] -= mean[i] = wire_round(mean[i], DType::bf16);
      }
      arena_.write(mean, arrays[a].data);
    }
  }
  for (std::uint32_t p = 0; p < slots_.size() && engine_->watch() != nullptr; ++p) {
    const WatchdogState* lowest = nullptr;  // of another world: whoever has lowered eta most
    for (const ReducerState& source : sources) {
      const auto watchdog = source.watchdog.find(slots_[p].parameter.name);
      if (watchdog == source.watchdog.end()) continue;
      const WatchdogState& found = watchdog->second;
      if (lowest == nullptr || (found.eta > 0 && (lowest->eta == 0 || found.eta < lowest->eta))) lowest = &found;
    }
    engine_->watch()->set_state(p, lowest);
  }
  if (Watch* watch = sources.size() > 1 ? engine_->watch() : nullptr) watch->restart();  // the mean of residuals is smaller than each
  step_ = front.step;
  flush_next_ = front.flush;
  flushed_step_ = false;
  start_until_ = front.start_until;
  blank_ = false;
  starting_step_ = first_average_ = false;
  bad_before_ = step_ + 1 < dense_steps_ ? 0 : front.nonfinite_steps;
  for (ParameterSlot& slot : slots_) {
    const auto dense = front.dense.find(slot.parameter.name);
    slot.dense_now = slot.compressible && dense != front.dense.end();
    if (slot.dense_now) slot.dtype = dense->second;
  }
  ++epoch_;
  if (recursion_.averaged) {
    freeze_at_ = freeze_at;
    if (was_frozen_ != is_frozen()) ++epoch_;
    awaits_handover_ = options_.momentum_elsewhere && is_frozen();
  }
  std::fill(seen_.begin(), seen_.end(), step_);
  cards_compared_ = false;  // an optimizer may load its state as well
  engine_->set_started(front.started || !options_.step_verdict);
  engine_->set_nonfinite_steps(front.nonfinite_steps);
  const std::lock_guard counters(counters_);
  steps_done_ = front.step;
}

}  // namespace thinwire
