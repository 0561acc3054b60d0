# nginx as a proxy, in the folder $DIR, that asks the name server $SERVER: what it dials for each name, as "name 4 …".
# It asks for both families at once.
cat > "$DIR/nginx.conf" <<END
daemon off; master_process off; user root; pid $DIR/nginx.pid; error_log $DIR/error.log;
events {}
http {
    access_log off; client_body_temp_path $DIR; proxy_temp_path $DIR; fastcgi_temp_path $DIR;
    uwsgi_temp_path $DIR; scgi_temp_path $DIR;
    resolver $SERVER; resolver_timeout 5s;
    server {
        listen 127.0.0.1:8000;
        location ~ ^/(.*)\$ { proxy_pass http://\$1:8080; proxy_connect_timeout 2s; }
    }
}
END
: > "$DIR/error.log"
nginx -c "$DIR/nginx.conf" -e "$DIR/error.log" &
until curl -s -o /dev/null http://127.0.0.1:8000/; do sleep 0.05; done
while [ $# -gt 1 ]; do
    : > "$DIR/error.log"
    body=$(curl -s "http://127.0.0.1:8000/$1")
    dialled=$(sed -n 's|.*upstream: "http://\([0-9.]*\):8080/.*|\1|p' "$DIR/error.log" | head -n 1)
    status=$(sed -n 's/.*could not be resolved (.: \(.*\)), client.*/\1/p' "$DIR/error.log" | head -n 1)
    case "$body" in echo) echo served ;; *) echo "${dialled:-${status:-$body}}" ;; esac
    shift 2
done
kill $!
