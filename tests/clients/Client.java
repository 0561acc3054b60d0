import java.io.IOException;
import java.net.DatagramPacket;
import java.net.DatagramSocket;
import java.net.InetSocketAddress;
import java.net.Socket;
import java.net.StandardProtocolFamily;
import java.nio.channels.DatagramChannel;
import java.nio.channels.SocketChannel;

/**
 * Dials cells of the socket matrix with Java: {@code java Client.java [KIND ADDRESS PORT]...}.
 *
 * <p>Java makes IPv6 sockets, on which it dials IPv4 addresses as v4-mapped; it has no v4-mapped
 * addresses of its own. An IPv4 socket is one that was asked for. Java makes no MPTCP sockets;
 * under {@code mptcpize run} all its TCP sockets are that.
 */
class Client {
    public static void main(String[] words) throws IOException {
        for (int at = 0; at < words.length; at += 3) {
            boolean isFour = !words[at + 1].contains(":");
            InetSocketAddress vip = new InetSocketAddress(words[at + 1], Integer.parseInt(words[at + 2]));
            switch (words[at]) {
                case "tcp", "mptcp" -> stream(isFour, vip);
                case "udp-connected" -> connected(isFour, vip);
                case "udp-unconnected" -> unconnected(isFour, vip);
                default -> throw new IllegalArgumentException(words[at]);
            }
        }
    }

    static void stream(boolean isFour, InetSocketAddress vip) throws IOException {
        try (Socket socket = isFour ? SocketChannel.open(StandardProtocolFamily.INET).socket() : new Socket()) {
            socket.connect(vip);
            InetSocketAddress peer = (InetSocketAddress) socket.getRemoteSocketAddress();
            socket.getOutputStream().write('?');
            print(new String(socket.getInputStream().readAllBytes()), peer);
        }
    }

    static DatagramSocket udp(boolean isFour) throws IOException {
        return isFour ? DatagramChannel.open(StandardProtocolFamily.INET).socket() : new DatagramSocket();
    }

    static void connected(boolean isFour, InetSocketAddress vip) throws IOException {
        try (DatagramSocket socket = udp(isFour)) {
            socket.connect(vip);
            InetSocketAddress peer = (InetSocketAddress) socket.getRemoteSocketAddress();
            socket.send(new DatagramPacket(new byte[] {'?'}, 1));
            DatagramPacket answer = new DatagramPacket(new byte[16], 16);
            socket.receive(answer);
            print(text(answer), peer, (InetSocketAddress) answer.getSocketAddress());
        }
    }

    static void unconnected(boolean isFour, InetSocketAddress vip) throws IOException {
        try (DatagramSocket socket = udp(isFour)) {
            socket.send(new DatagramPacket(new byte[] {'?'}, 1, vip));
            DatagramPacket answer = new DatagramPacket(new byte[16], 16);
            socket.receive(answer);
            print(text(answer), (InetSocketAddress) answer.getSocketAddress());
        }
    }

    static String text(DatagramPacket packet) {
        return new String(packet.getData(), 0, packet.getLength());
    }

    static void print(String answer, InetSocketAddress... peers) {
        StringBuilder line = new StringBuilder(answer);
        for (InetSocketAddress peer : peers) {
            line.append(' ').append(peer.getAddress().getHostAddress()).append(' ').append(peer.getPort());
        }
        System.out.println(line);
    }
}
