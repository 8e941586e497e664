// pgJDBC with its defaults: a statement becomes a named one at its fifth execution (prepareThreshold).
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.sql.Statement;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;

public class Defaults {
  static void check(boolean condition, String what) {
    if (!condition) throw new AssertionError(what);
  }

  static void work(String url, int me) throws Exception {
    try (Connection connection = DriverManager.getConnection(url)) {
      try (PreparedStatement statement = connection.prepareStatement("SELECT ?::int + " + me)) {
        for (int n = 0; n < 20; n++) {
          statement.setInt(1, n);
          try (ResultSet rows = statement.executeQuery()) {
            check(rows.next() && rows.getInt(1) == n + me, "sum");
          }
        }
      }
      connection.setAutoCommit(false);
      try (Statement statement = connection.createStatement()) {
        statement.execute("CREATE TEMP TABLE t (a int) ON COMMIT DROP");
        try (PreparedStatement insert = connection.prepareStatement("INSERT INTO t VALUES (?)")) {
          for (int n = 0; n < 100; n++) {
            insert.setInt(1, n);
            insert.addBatch();
          }
          check(insert.executeBatch().length == 100, "batch");
        }
        statement.setFetchSize(7);  // portals, suspended
        int count = 0;
        try (ResultSet rows = statement.executeQuery("SELECT a FROM t ORDER BY a")) {
          while (rows.next()) check(rows.getInt(1) == count++, "order");
        }
        check(count == 100, "count");
        connection.commit();
        try {
          statement.execute("SELECT 1/0");
          check(false, "no error");
        } catch (SQLException error) {
          check("22012".equals(error.getSQLState()), error.toString());
        }
        connection.rollback();
      }
      check(connection.isValid(5), "valid");
    }
  }

  public static void main(String[] arguments) throws Exception {
    String url = System.getenv("JDBC_URL");
    ExecutorService executor = Executors.newFixedThreadPool(10);
    List<Future<?>> running = new ArrayList<>();
    for (int n = 0; n < 20; n++) {
      int me = n;
      running.add(executor.submit(() -> { work(url, me); return null; }));
    }
    for (Future<?> future : running) future.get();
    executor.shutdown();
    System.out.println("ok");
  }
}
