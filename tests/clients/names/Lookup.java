// Java's resolver: the address of each name in a family, as "name 4 name 6 …".
import java.net.Inet6Address;
import java.net.InetAddress;
import java.net.UnknownHostException;

class Lookup {
    public static void main(String[] args) {
        for (int i = 0; i + 1 < args.length; i += 2) {
            String answer = "no such address";
            try {
                for (InetAddress address : InetAddress.getAllByName(args[i])) {
                    if (address instanceof Inet6Address == args[i + 1].equals("6")) {
                        answer = address.getHostAddress();
                    }
                }
            } catch (UnknownHostException error) {
                answer = "UnknownHostException";
            }
            System.out.println(answer);
        }
    }
}
