SELECT aid, bid FROM pgbench_accounts WHERE aid <= 1000;
