// For integration/test_scanner.py: reads SQL texts, each ended by a zero byte, and prints the residue of each on a line.
#include <iostream>
#include <string>

#include "protocol/sql_scan.hpp"

int main() {
  std::ios::sync_with_stdio(false);
  for (std::string sql; std::getline(std::cin, sql, '\0');) std::cout << pgsidecar::protocol::scan_sql(sql) << '\n';
}
