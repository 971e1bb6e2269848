// Runs every group of calls, after kernels that are wrong on purpose: a detector that finds nothing there is broken.
// ThreadSanitizer shows the first race and ends the program. With names of groups it runs these alone.
#include "race.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace race {
namespace {

using Seconds = std::chrono::duration<double>;

struct Group {
  const char* name;
  void (*calls)();
};

constexpr Group kGroups[] = {
    {"cross_entropy", cross_entropy_calls},
    {"z_loss", z_loss_calls},
    {"accumulate", accumulate_calls},
    {"pairwise", pairwise_calls},
    {"clip_loss", clip_loss_calls},
    {"mala", attention_calls},
    {"sinkhorn", sinkhorn_calls},
    {"sinkhorn_apply", sinkhorn_apply_calls},
    {"sinkhorn_unrolled", sinkhorn_unrolled_calls},
    {"simplex_topk", simplex_topk_calls},
    {"sparse_ot", sparse_ot_calls},
    {"router", router_calls},
    {"wta_crs", wta_crs_calls},
};

// Of driver_wrong.cpp: no barrier, written again, ordered by a shuffle, written by two blocks.
constexpr int kFirstRace = 6, kLastRace = 9;

constexpr const char* kPlanted = "--planted";

std::string now_running;
int64_t calls_done = 0;

}  // namespace

void begin(const std::string& what) { now_running = what; }

void end(const char* error, const Memory& memory) {
  const std::string wrong = error != nullptr ? error : memory.fault();
  if (!wrong.empty()) {
    std::fprintf(stderr, "\n%s: %s\n", now_running.c_str(), wrong.c_str());
    std::exit(1);
  }
  ++calls_done;
}

namespace {

void run_group(const Group& group) {
  std::printf("%-18s", group.name);
  std::fflush(stdout);
  calls_done = 0;
  const auto start = std::chrono::steady_clock::now();
  group.calls();
  const Seconds taken = std::chrono::steady_clock::now() - start;
  std::printf("%5lld calls %6.1f s\n", static_cast<long long>(calls_done), taken.count());
}

// Each in a process of its own, since the first report ends it.
bool finds_planted_races(const std::string& program) {
  for (int which = kFirstRace; which <= kLastRace + 1; ++which) {
    const std::string command = "'" + program + "' " + kPlanted + " " + std::to_string(which) + " > /dev/null 2>&1";
    const bool found = std::system(command.c_str()) != 0, is_race = which <= kLastRace;
    if (found == is_race) continue;
    std::fprintf(stderr, is_race ? "the race of wrong kernel %d is not found\n" : "kernel %d has no race\n", which);
    return false;
  }
  std::printf("%-18s%5d found\n", "planted races", kLastRace - kFirstRace + 1);
  return true;
}

bool is_wanted(const char* name, int count, char** names) {
  return count == 0 || std::any_of(names, names + count, [=](const char* n) { return std::strcmp(n, name) == 0; });
}

int run_groups(int count, char** names) {
  int ran = 0;
  for (const Group& group : kGroups) {
    if (!is_wanted(group.name, count, names)) continue;
    run_group(group);
    ++ran;
  }
  if (ran >= (count == 0 ? 1 : count)) return 0;
  std::fprintf(stderr, "no such group\n");
  return 1;
}

}  // namespace
}  // namespace race

extern "C" const char* __tsan_default_options() { return "halt_on_error=1:exitcode=1"; }

// Called before a report is shown.
extern "C" void __tsan_on_report(void*) { std::fprintf(stderr, "\na race in %s\n", race::now_running.c_str()); }

int main(int count, char** arguments) {
  if (count == 3 && std::strcmp(arguments[1], race::kPlanted) == 0) {
    const char* error = wrong_kernel(std::atoi(arguments[2]));
    if (error != nullptr) std::fprintf(stderr, "%s\n", error);
    return 0;
  }
  if (!race::finds_planted_races(arguments[0])) return 1;
  return race::run_groups(count - 1, arguments + 1);
}
