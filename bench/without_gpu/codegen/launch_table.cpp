// Prints the lines of the launch table that serve each given generation, as JSON.
#include "../../../csrc/gpu/launch_table.h"

#include <cstdio>
#include <cstdlib>
#include <iomanip>
#include <iostream>

using namespace fsl::gpu;

int main(int count, char** words) {
  const std::pair<const char*, Kernel> kernels[] = {{"row_stats", Kernel::row_stats},
                                                    {"row_grad", Kernel::row_grad},
                                                    {"row_stats_grad", Kernel::row_stats_grad}};
  const char* separator = "[";
  for (int i = 1; i < count; ++i) {
    for (const auto& [name, kernel] : kernels) {
      for (const Line& line : kTable) {
        if (!is_for(line, static_cast<int>(std::strtol(words[i], nullptr, 0)), kernel)) continue;
        std::cout << separator << "{\"generation\": " << std::quoted(words[i])
                  << ", \"kernel\": " << std::quoted(name) << ", \"columns\": ";
        if (line.columns == kAny) std::cout << "null";
        else std::cout << line.columns;
        std::cout << ", \"threads\": " << line.threads << ", \"segment\": " << line.segment
                  << ", \"why\": " << std::quoted(line.why) << "}";
        separator = ",\n";
        if (line.columns == kAny) break;  // later lines are for older chips
      }
    }
  }
  std::cout << "]\n";
}
