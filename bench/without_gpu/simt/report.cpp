// The error message of a launch that broke a rule.
#include "engine.h"

namespace simt {
namespace {

std::string state_of(const Thread& thread) {
  if (thread.waits) return "wait at " + words(*thread.waits, thread.waits->site, thread.waits->mask);
  if (thread.exited) return "have exited";
  return &thread == engine.running ? "" : "are on their way";
}

// "threads 0-15, 32-47 wait at barrier (rows.cuh:20); threads 48-63 have exited"
std::string states_of(const Block& block) {
  const Thread* const first = block.all.first;
  std::vector<std::pair<std::string, std::string>> states;  // each state and its threads
  for (int i = 0; i < block.all.count;) {
    const std::string state = state_of(first[i]);
    const int begin = i;
    while (i < block.all.count && state_of(first[i]) == state) ++i;
    if (state.empty()) continue;
    std::string* threads = nullptr;
    for (auto& known : states)
      if (known.first == state) threads = &known.second;
    if (!threads) {
      states.emplace_back(state, "threads ");
      threads = &states.back().second;
    } else {
      *threads += ", ";
    }
    *threads += std::to_string(begin) + (i - 1 > begin ? "-" + std::to_string(i - 1) : "");
  }
  std::string text;
  for (const auto& state : states) text += (text.empty() ? "" : "; ") + state.second + " " + state.first;
  return text;
}

}  // namespace

std::string words(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

std::string words(const Variable& variable) {
  return std::string(variable.name) + " (" + words(variable.site) + ")";
}

std::string words(const Meeting& meeting, Site site, int mask) {
  return meeting.what + (mask ? " by " + std::to_string(mask) : std::string()) + " (" + words(site) + ")";
}

void fail(const std::string& why) {
  {
    const tsan::Unseen unseen;
    engine.failure =
        std::string(engine.grid.kernel) + ", block " + std::to_string(engine.running->block) + ": " + why;
    for (const Block& block : engine.blocks) {
      const std::string states = states_of(block);
      if (states.empty()) continue;
      engine.failure += "; ";
      if (engine.grid.cluster > 1)
        engine.failure += "in block " + std::to_string(block.all.first->block) + ", ";
      engine.failure += states;
    }
  }
  leave();
}

}  // namespace simt
