// Dials cells of the socket matrix with Go: `client [KIND ADDRESS PORT]...`.
//
// Go takes v4-mapped addresses for IPv4 ones. It dials them as v4-mapped on an IPv6 socket, which
// is what one gets that is bound to all IPv6 addresses.
package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
)

const protoMPTCP = 262

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

func isMapped(vip string) bool { return strings.HasPrefix(vip, "[::ffff:") }

func tcp(vip string) net.Conn {
	dialer := net.Dialer{}
	if isMapped(vip) {
		dialer.LocalAddr = &net.TCPAddr{IP: net.IPv6unspecified}
	}
	return must(dialer.Dial("tcp", vip))
}

// Go's own MPTCP came with 1.21; before, it takes a socket that a system call made.
func mptcp(vip string) net.Conn {
	address := must(net.ResolveTCPAddr("tcp", vip))
	family := syscall.AF_INET6
	var to syscall.Sockaddr
	if four := address.IP.To4(); four != nil && !isMapped(vip) {
		family = syscall.AF_INET
		to = &syscall.SockaddrInet4{Port: address.Port, Addr: *(*[4]byte)(four)}
	} else {
		to = &syscall.SockaddrInet6{Port: address.Port, Addr: *(*[16]byte)(address.IP.To16())}
	}
	file := os.NewFile(uintptr(must(syscall.Socket(family, syscall.SOCK_STREAM, protoMPTCP))), "mptcp")
	defer file.Close()
	if err := syscall.Connect(int(file.Fd()), to); err != nil {
		panic(err)
	}
	return must(net.FileConn(file))
}

func stream(connection net.Conn) {
	peer := connection.RemoteAddr()
	must(connection.Write([]byte("?")))
	show(must(io.ReadAll(connection)), peer)
	connection.Close()
}

func connected(vip string) {
	dialer := net.Dialer{}
	if isMapped(vip) {
		dialer.LocalAddr = &net.UDPAddr{IP: net.IPv6unspecified}
	}
	connection := must(dialer.Dial("udp", vip)).(*net.UDPConn)
	must(connection.Write([]byte("?")))
	answer := make([]byte, 16)
	length, source, err := connection.ReadFrom(answer)
	show(answer[:must(length, err)], connection.RemoteAddr(), source)
	connection.Close()
}

func unconnected(vip string) {
	network := "udp4"
	if strings.HasPrefix(vip, "[") {
		network = "udp"
	}
	socket := must(net.ListenPacket(network, ":0"))
	must(socket.WriteTo([]byte("?"), must(net.ResolveUDPAddr("udp", vip))))
	answer := make([]byte, 16)
	length, source, err := socket.ReadFrom(answer)
	show(answer[:must(length, err)], source)
	socket.Close()
}

func show(answer []byte, peers ...net.Addr) {
	line := string(answer)
	for _, peer := range peers {
		host, port, err := net.SplitHostPort(peer.String())
		line += " " + must(host, err) + " " + port
	}
	fmt.Println(line)
}

func main() {
	words := os.Args[1:]
	for at := 0; at+2 < len(words); at += 3 {
		vip := net.JoinHostPort(words[at+1], words[at+2])
		switch words[at] {
		case "tcp":
			stream(tcp(vip))
		case "mptcp":
			stream(mptcp(vip))
		case "udp-connected":
			connected(vip)
		case "udp-unconnected":
			unconnected(vip)
		default:
			panic(words[at])
		}
	}
}
